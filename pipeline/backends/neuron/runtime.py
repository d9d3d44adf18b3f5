"""All graphs and all ranks of an artifact on a Neuron device: one NxDModel, assembled from verified files.

One process drives every rank. Nothing is compiled, and no TorchScript or pickle is read: NxDModel is built from each
graph's NEFF and metaneff, as in `NxDModel.load`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.neuron import support
from pipeline.backends.neuron.boundary import Boundary, metaneff
from pipeline.backends.neuron.graph_file import BOUNDARY, LAYOUT, METANEFF, Graph, read_graph
from pipeline.backends.neuron.module import NeuronModule, dotted, key
from pipeline.backends.neuron.support import sdk_environment
from pipeline.errors import ArtifactError, HostError
from pipeline.files.limits import AGAIN
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.packing import InOutPacking, PlainPacking
from pipeline.graphs.shards import packing_of, read_shard
from pipeline.graphs.signature import TensorSpec
from pipeline.graphs.spec import GraphSpec

TURNED, PLAIN = InOutPacking.name, PlainPacking.name
"""Layouts of weights: of this version's artifacts, and of earlier ones."""


class NeuronRanks:
    """Every rank of an artifact on this host's device; see `backends.base.Ranks`."""

    copy_row: None = None
    """The runtime writes whole buffers alone."""

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
        """Run one graph on every rank; return rank 0's results, on the CPU."""
        io = self._graphs[spec.name].io
        inputs = {tensor.name: arguments[tensor.name].to(torch_dtype(tensor.dtype)) for tensor in io.arguments}
        results = self._model(model_name=spec.name, **inputs)
        outputs = [results] if isinstance(results, Tensor) else list(results)
        return {tensor.name: output.cpu() for tensor, output in zip(io.outputs, outputs, strict=True)}

    def reset(self) -> None:
        """Zero all state on every rank."""
        for state in states(list(self._graphs.values())).values():
            zeros = torch.zeros(state.shape, dtype=torch_dtype(state.dtype))
            for rank in range(self._ranks):
                self._model.write_to_neuron_buffer(zeros, dotted(state.name), rank)

    def state(self) -> dict[str, Tensor]:
        """Return an empty dict: the state is on the device."""
        return {}

    def close(self) -> None:
        """Do nothing: the device's memory is freed when the process exits."""


def read_weights(root: Path, manifest: PairManifest) -> list[dict[str, Tensor]]:
    """Read each rank's weights, by the names of the graphs; read equal files (a replicated draft) once.

    Graphs of earlier versions read plain weights, and name them so: artifacts of both kinds are loaded.

    Raises:
        ArtifactError: a rank's file is missing, or shards have different or unknown layouts.

    """
    ranks, read, packings = [], dict[str, dict[str, Tensor]](), dict[str, str]()
    for rank in range(manifest.ranks):
        weights: dict[str, Tensor] = {}
        for model in ("target", "draft"):
            name = f"weights/{model}/rank-{rank}-of-{manifest.ranks}.safetensors"
            if name not in manifest.files or not (root / name).is_file():
                problem = f"the {model}'s weights of rank {rank} are missing; the artifact has {manifest.ranks} ranks"
                raise ArtifactError(problem, where=str(root / name), fix="pull the artifact again, without --only")
            digest = f"{model}/{manifest.files[name].sha256}"
            if digest not in read:
                read[digest] = {dotted(f"{model}/{n}"): tensor for n, tensor in read_shard(root / name).items()}
            weights |= read[digest]
            packings.setdefault(packing_of(root / name), name)
        ranks.append(weights)
    if len(packings) > 1 or not packings.keys() <= {PLAIN, TURNED}:
        found = ", ".join(f"{packing or 'none'} ({name})" for packing, name in packings.items())
        what = f"found weights in layout {found}; expected {TURNED}, or {PLAIN} for all of them"
        raise ArtifactError(what, where=str(root), fix=AGAIN)
    return ranks


def check_weights(graphs: dict[str, Graph], ranks: list[dict[str, Tensor]], root: Path) -> None:
    """Check that every rank's shards hold every weight of every graph, with its shape and dtype.

    Raises:
        ArtifactError: lists the faults, each with both values.

    """
    specs = {dotted(spec.name): spec for graph in graphs.values() for spec in graph.io.weights}
    faults = [fault for rank, weights in enumerate(ranks) for fault in _weight_faults(rank, weights, specs)]
    if faults:
        raise ArtifactError("; ".join(faults[:10]), where=str(root), fix=AGAIN)


def states(graphs: list[Graph]) -> dict[str, TensorSpec]:
    """Return the state of all graphs, by signature name; graphs that share a state agree on its shape.

    Raises:
        ArtifactError: two graphs disagree.

    """
    specs: dict[str, TensorSpec] = {}
    for graph in graphs:
        for spec in graph.io.state:
            first = specs.setdefault(spec.name, spec)
            if first != spec:
                problem = f"{spec.name} is {first.shape} in one graph, {spec.shape} in {graph.spec.name}"
                raise ArtifactError(problem, where="state", fix=AGAIN)
    return specs


def assemble(graphs: list[Graph], ranks: int) -> Any:
    """Return an NxDModel with every graph and the state of all graphs (by default it has the first graph's only)."""
    from neuronx_distributed import NxDModel  # of the SDK, imported only to run on a device
    from neuronx_distributed.trace.nxd_model.base_nxd_model import StateInitializer

    specs = {dotted(name): spec for name, spec in states(graphs).items()}
    initial = StateInitializer(
        {name: list(spec.shape) for name, spec in specs.items()},
        {name: torch_dtype(spec.dtype) for name, spec in specs.items()},
        ranks,
    )
    model = NxDModel(world_size=ranks, state_initializer=initial)
    for graph in graphs:
        model.add(graph.spec.name, trace_artifacts(graph), graph)
    return model


def trace_artifacts(graph: Graph) -> Any:
    """Rebuild NxD's trace artifacts of a graph from its file."""
    # Of the SDK, imported only to run on a device.
    from neuronx_distributed.trace.model_builder_utils import ModelParamInfo, ProvidedArgInfo, TraceArtifacts

    meta, flattener, packer = _described(graph) if BOUNDARY in graph.parts else _recorded(graph)
    checkpoint_keys = [key(tensor.checkpoint_key) for tensor in meta.input_tensors]
    arguments = {spec.name: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in graph.io.arguments}
    names = [name for name in NeuronModule.forward.__annotations__ if name != "return"]
    return TraceArtifacts(
        hlo=None,
        metaneff=meta,
        flattener=flattener,
        packer=packer,
        weight_name_to_idx={name: index for index, name in enumerate(checkpoint_keys) if name},
        weight_names_to_skip=set(),
        provided_args=[ProvidedArgInfo(name, False, arguments[name]) for name in names if name in arguments],
        model_params=[ModelParamInfo(name, False) for name in names],
    )


class Order(nn.Module):
    """Choose tensors by position; NxDModel calls one on a graph's arguments and another on its results."""

    def __init__(self, layout: Sequence[int]) -> None:
        super().__init__()
        self.layout = tuple(layout)
        self.exclude: list[int] | None = None

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors at the positions."""
        return [tensors[position] for position in self.layout]


def _described(graph: Graph) -> tuple[Any, nn.Module, nn.Module]:
    """Return metaneff, flattener and packer from the boundary that the StableHLO frontend wrote."""
    from torch_neuronx.proto import metaneff_pb2  # of the SDK, imported only to run on a device

    boundary = Boundary.from_json(graph.parts[BOUNDARY], f"{graph.spec.name}: {BOUNDARY}")
    given = [spec.name for spec in graph.io.arguments]
    flattener = Order([given.index(name) for name in boundary.arguments])
    return metaneff(boundary, metaneff_pb2), flattener, Order(range(len(graph.io.outputs)))


def _recorded(graph: Graph) -> tuple[Any, nn.Module, nn.Module]:
    """Return metaneff, flattener and packer as NxD's trace made them."""
    # Of the SDK, imported only to run on a device.
    from torch_neuronx.proto import metaneff_pb2
    from torch_neuronx.xla_impl import structure

    meta = metaneff_pb2.MetaNeff()
    meta.ParseFromString(graph.parts[METANEFF])
    layout = json.loads(graph.parts[LAYOUT])
    flattener, packer = layout["flattener"], layout["packer"]
    return (
        meta,
        structure.Flattener(*(ast.literal_eval(flattener[name]) for name in ("layout", "exclude"))),
        structure.Packer(*(ast.literal_eval(packer[name]) for name in ("layout", "identifiers", "constants"))),
    )


def _weight_faults(rank: int, weights: dict[str, Tensor], specs: dict[str, TensorSpec]) -> Iterator[str]:
    for name, spec in specs.items():
        tensor = weights.get(name)
        if tensor is None:
            yield f"rank {rank} has no {name}"
        elif tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
            have = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            yield f"rank {rank}: {name} is {have}, expected {list(spec.shape)} {spec.dtype}"
    for name in weights.keys() - specs.keys():
        yield f"rank {rank}: {name} is in no graph"
