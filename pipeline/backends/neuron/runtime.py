"""All graphs and all ranks of an artifact on a Neuron device: one NxDModel, assembled from files that were verified.

One process drives every rank. Nothing is compiled, and no TorchScript or pickle is read: NxDModel is built from each
graph's NEFF and metaneff as `NxDModel.load` would rebuild it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.artifact.manifest import AGAIN, PairManifest
from pipeline.backends.neuron import support
from pipeline.backends.neuron.graph_file import Graph, read_graph
from pipeline.backends.neuron.module import NeuronModule, dotted, key
from pipeline.backends.neuron.support import sdk_environment
from pipeline.errors import ArtifactError, HostError
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.signature import TensorSpec
from pipeline.graphs.spec import GraphSpec


class NeuronRanks:
    """Every rank of an artifact on this host's device; see `backends.base.Ranks`."""

    def __init__(self, root: Path, manifest: PairManifest, chip: str, lnc: int) -> None:
        self._graphs = {entry.name: read_graph(root, entry, lnc) for entry in manifest.graphs}
        weights = read_weights(root, manifest)
        check_weights(self._graphs, weights, root)
        problems = support.run_problems(chip, lnc, manifest.ranks, support.device())
        if problems:
            where = f"{manifest.name}@{manifest.version}: {problems[0].where}"
            raise HostError("; ".join(problem.what for problem in problems), where=where, fix=problems[0].fix)
        with sdk_environment(chip, lnc):
            self._model = assemble(list(self._graphs.values()), manifest.ranks)
            self._model.set_weights(weights)
            self._model.to_neuron()
        self._ranks = manifest.ranks

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph on every rank; rank 0's results, on the CPU."""
        io = self._graphs[spec.name].io
        given = {one.name: arguments[one.name].to(torch_dtype(one.dtype)) for one in io.arguments}
        results = self._model(model_name=spec.name, **given)
        listed = [results] if isinstance(results, Tensor) else list(results)
        return {one.name: result.cpu() for one, result in zip(io.outputs, listed, strict=True)}

    def reset(self) -> None:
        """Zero all state on every rank."""
        for one in states(list(self._graphs.values())).values():
            zeros = torch.zeros(one.shape, dtype=torch_dtype(one.dtype))
            for rank in range(self._ranks):
                self._model.write_to_neuron_buffer(zeros, dotted(one.name), rank)

    def state(self) -> dict[str, Tensor]:
        """Nothing: it is on the device."""
        return {}

    def close(self) -> None:
        """Nothing to end: the device's memory goes with the process."""


def read_weights(root: Path, manifest: PairManifest) -> list[dict[str, Tensor]]:
    """Each rank's weights, by the names of the graphs; equal files (a replicated draft) are read once.

    Raises:
        ArtifactError: a rank's file is missing.

    """
    ranks, read = [], dict[str, dict[str, Tensor]]()
    for rank in range(manifest.ranks):
        weights: dict[str, Tensor] = {}
        for model in ("target", "draft"):
            name = f"weights/{model}/rank-{rank}-of-{manifest.ranks}.safetensors"
            if name not in manifest.files or not (root / name).is_file():
                what = f"the {model}'s weights of rank {rank} are missing; the artifact has {manifest.ranks} ranks"
                raise ArtifactError(what, where=str(root / name), fix="pull the artifact without --only, or again")
            digest = f"{model}/{manifest.files[name].sha256}"
            if digest not in read:
                with safe_open(root / name, framework="pt") as file:
                    read[digest] = {dotted(f"{model}/{n}"): file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            weights |= read[digest]
        ranks.append(weights)
    return ranks


def check_weights(graphs: dict[str, Graph], ranks: list[dict[str, Tensor]], root: Path) -> None:
    """Every weight of every graph must be in every rank's shards, with its shape and dtype.

    Raises:
        ArtifactError: names each fault with both values.

    """
    wanted = {dotted(one.name): one for graph in graphs.values() for one in graph.io.weights}
    faults = [fault for rank, weights in enumerate(ranks) for fault in _weight_faults(rank, weights, wanted)]
    if faults:
        raise ArtifactError("; ".join(faults[:10]), where=str(root), fix=AGAIN)


def states(graphs: list[Graph]) -> dict[str, TensorSpec]:
    """State of all graphs, by signature name; a state that two graphs share has one shape.

    Raises:
        ArtifactError: two graphs disagree.

    """
    found: dict[str, TensorSpec] = {}
    for graph in graphs:
        for one in graph.io.state:
            if found.setdefault(one.name, one) != one:
                what = f"{one.name} is {found[one.name].shape} in one graph, {one.shape} in {graph.spec.name}"
                raise ArtifactError(what, where="state", fix=AGAIN)
    return found


def assemble(graphs: list[Graph], ranks: int) -> Any:
    """NxDModel with every graph, and state that covers them all (its own default looks at the first graph only)."""
    from neuronx_distributed import NxDModel
    from neuronx_distributed.trace.nxd_model.base_nxd_model import StateInitializer

    found = {dotted(name): one for name, one in states(graphs).items()}
    initial = StateInitializer(
        {name: list(one.shape) for name, one in found.items()},
        {name: torch_dtype(one.dtype) for name, one in found.items()},
        ranks,
    )
    model = NxDModel(world_size=ranks, state_initializer=initial)
    for graph in graphs:
        model.add(graph.spec.name, trace_artifacts(graph), graph)
    return model


def trace_artifacts(graph: Graph) -> Any:
    """NxD's trace artifacts of a graph, rebuilt from its file."""
    from neuronx_distributed.trace.model_builder_utils import ModelParamInfo, ProvidedArgInfo, TraceArtifacts
    from torch_neuronx.proto import metaneff_pb2
    from torch_neuronx.xla_impl import structure

    meta = metaneff_pb2.MetaNeff()
    meta.ParseFromString(graph.metaneff)
    flattener, packer = graph.layout["flattener"], graph.layout["packer"]
    arguments = {one.name: torch.zeros(one.shape, dtype=torch_dtype(one.dtype)) for one in graph.io.arguments}
    names = [name for name in NeuronModule.forward.__annotations__ if name != "return"]
    weights = (place for place, one in enumerate(meta.input_tensors) if key(one.checkpoint_key))
    return TraceArtifacts(
        hlo=None,
        metaneff=meta,
        flattener=structure.Flattener(*(ast.literal_eval(flattener[name]) for name in ("layout", "exclude"))),
        packer=structure.Packer(*(ast.literal_eval(packer[name]) for name in ("layout", "identifiers", "constants"))),
        weight_name_to_idx={key(meta.input_tensors[place].checkpoint_key): place for place in weights},
        weight_names_to_skip=set(),
        provided_args=[ProvidedArgInfo(name, False, arguments[name]) for name in names if name in arguments],
        model_params=[ModelParamInfo(name, False) for name in names],
    )


def _weight_faults(rank: int, weights: dict[str, Tensor], wanted: dict[str, TensorSpec]) -> Iterator[str]:
    for name, spec in wanted.items():
        tensor = weights.get(name)
        if tensor is None:
            yield f"rank {rank} has no {name}"
        elif tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
            have = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            yield f"rank {rank}: {name} is {have}, its graphs need {list(spec.shape)} {spec.dtype}"
    for name in weights.keys() - wanted.keys():
        yield f"rank {rank}: no graph knows {name}"
