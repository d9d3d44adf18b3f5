"""The Neuron backend: trace a graph through NxD's ModelBuilder, compile it to a NEFF. Runs on any host with the SDK.

Follows "ModelBuilderV2 API Reference" and the NxD source: weights are parameters, caches are buffers that the forward
pass replaces (the trace turns them into aliased state), one forward signature serves all graphs of an artifact.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backends.base import Executable, Toolchain, Traced
from pipeline.backends.neuron import compiler, hlo, support
from pipeline.errors import HostError, Problem
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import SeamsFor, run_phase
from pipeline.graphs.packing import Packing, PlainPacking
from pipeline.graphs.signature import Signature, signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.parallel import Seams, State, Writes

NEFF, METANEFF, LAYOUT = "graph.neff", "metaneff.pb", "layout.json"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time a zip can name: equal graphs are equal bytes."""


class NeuronSeams(Seams):
    """Caches replaced instead of written in place, top-k by the compiler's own operator, NxD's collectives."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:
        """A scatter into a new tensor, which takes the cache's name."""
        state[name] = state[name].index_put(writes.index, new_BHTD)
        return state[name]

    def put_row(self, state: State, name: str, rows_B: Tensor, values: Tensor) -> None:
        """A scatter into a new tensor, which takes the state's name."""
        state[name] = state[name].index_put((rows_B,), values)

    def top(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`AwsNeuronTopK`: XLA's own top-k is a sort, which the compiler does not take."""
        from torch_neuronx.xla_impl.ops import TopK

        values, indices = TopK.apply(scores, count, dim=scores.dim() - 1)
        return values, indices.long()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import mappings

        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(x)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks, in rank order."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import mappings

        gathered: Tensor = mappings.gather_from_tensor_model_parallel_region(x)
        return gathered


class NeuronModule(nn.Module):
    """A graph as ModelBuilder wants it: weights and state inside, arguments by name, None for what a phase lacks.

    Names are those of the signature with dots for slashes: `target.model.norm.weight`, `draft.k.0`.
    """

    def __init__(self, spec: GraphSpec, pair: PairSpec, io: Signature, seams_for: SeamsFor) -> None:
        super().__init__()
        self.spec, self.pair, self.io, self.seams_for = spec, pair, io, seams_for
        for one in io.weights:
            tensor = torch.empty(one.shape, dtype=torch_dtype(one.dtype))
            owner, leaf = self._place(one.name)
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        for one in io.state:
            owner, leaf = self._place(one.name)
            owner.register_buffer(leaf, torch.zeros(one.shape, dtype=torch_dtype(one.dtype)))

    def forward(
        self,
        tokens: Tensor | None = None,
        lengths: Tensor | None = None,
        slots: Tensor | None = None,
        last_token: Tensor | None = None,
        position: Tensor | None = None,
        active: Tensor | None = None,
        temperature: Tensor | None = None,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
        uniforms: Tensor | None = None,
        copied: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the phase; state buffers are replaced."""
        arguments = {
            "tokens": tokens, "lengths": lengths, "slots": slots, "last_token": last_token, "position": position,
            "active": active, "temperature": temperature, "top_k": top_k, "top_p": top_p, "uniforms": uniforms,
            "copied": copied,
        }  # fmt: skip
        named = {name: value for name, value in arguments.items() if value is not None}
        for one in self.io.weights + self.io.state:
            owner, leaf = self._place(one.name)
            named[one.name] = getattr(owner, leaf)
        outputs = run_phase(self.spec, self.pair, named, self.seams_for)
        for one in self.io.state:
            owner, leaf = self._place(one.name)
            setattr(owner, leaf, named[one.name])
        return outputs

    def example(self) -> dict[str, Tensor]:
        """Arguments to trace with: zeros, by name."""
        return {one.name: torch.zeros(one.shape, dtype=torch_dtype(one.dtype)) for one in self.io.arguments}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The submodule that owns a dotted name, made where it is not there yet."""
        *path, leaf = dotted(name).split(".")
        owner: nn.Module = self
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf


def dotted(name: str) -> str:
    """A signature's name as parameters and the compiled graph spell it."""
    return name.replace("/", ".")


class NeuronBackend:
    """NEFFs for Trainium and Inferentia 2."""

    graph_file = "graph.neuron.zip"
    """The NEFF, its metaneff, and how arguments and results are packed: all that a loader needs of one graph."""

    def __init__(self, target: str, lnc: int = 1, flags: Mapping[str, str] | None = None) -> None:
        self.target, self.lnc, self.extra = target, lnc, dict(flags or {})
        self.packing: Packing = PlainPacking()

    def toolchain(self) -> Toolchain:
        """Versions of the SDK's packages; `missing` for those that are not here."""
        return Toolchain("neuron", support.versions())

    def flags(self) -> dict[str, str]:
        """The compiler's flags, and the environment that changes what tracing and compiling give."""
        code = " ".join(compiler.arguments(self.target, self.lnc, self.extra))
        return {"neuronx-cc": code} | {f"env.{name}": value for name, value in support.environment().items()}

    def requires(self) -> dict[str, str]:
        """A NEFF runs on one chip, with one size of logical cores."""
        return {"device": "neuron", "chip": self.target, "lnc": str(self.lnc)}

    def host(self) -> dict[str, str]:
        """What this host has, in the words of `requires`."""
        here = support.device()
        return {"device": "none"} if here is None else {"device": "neuron", "chip": here.chip, "lnc": str(here.lnc)}

    def preflight(self) -> list[Problem]:
        """What is missing for a build: packages, versions, compiler, environment, flags."""
        taken = sorted({name.lstrip("-") for name in self.extra} & compiler.OWN_FLAGS)
        own = [Problem("backend.flags", f"{name} is not a recipe's to set", "remove it") for name in taken]
        return own + support.problems(self.target, self.lnc, support.versions())

    def trace(self, spec: GraphSpec, pair: PairSpec) -> Traced:
        """Trace one graph for all ranks, with no device, and check that names and state are what the shards hold."""
        io = signature(spec, pair, self.packing)
        with sdk_environment(self.target, self.lnc):
            from neuronx_distributed import ModelBuilder, NxDParallelState  # asks for the chip when it is imported

            with NxDParallelState(
                world_size=pair.models.tp, tensor_model_parallel_size=pair.models.tp, lnc_size=self.lnc
            ):
                module = NeuronModule(spec, pair, io, NeuronSeams)
                builder = ModelBuilder(module)
                builder.trace(kwargs=module.example(), tag=spec.name)
                traced = builder.trace_artifacts_collection[spec.name]
        check_names(spec, io, traced.metaneff)
        return Traced(hlo.canonical(traced.hlo, traced.metaneff), io, traced)

    def compile(self, traced: Traced, work: Path) -> bytes:
        """Compile with neuronx-cc; returns the graph file."""
        environment = support.AT_START | sdk_variables(self.target, self.lnc)
        listing = _operators(tuple(environment.items()))
        supported = hlo.DOCUMENTED | hlo.NAMED_LATER if listing is None else hlo.operators(listing)
        if found := hlo.faults(traced.program.hlo, supported):
            what = f"neuronx-cc does not take this graph: {'; '.join(found)}"
            raise HostError(what, where="compile", fix="please report this: it is a fault of Tandem's graph")
        flags = compiler.arguments(self.target, self.lnc, self.extra)
        neff = compiler.compile_neff(hlo.stripped(traced.program.hlo), flags, work, environment)
        return pack(neff, traced.program)

    def load(self, graph: Path) -> Executable:
        """Not a thing a single graph can do here: see `runtime.NeuronRanks`."""
        what = "a NEFF runs together with the other graphs of its artifact, on all ranks"
        raise HostError(what, where=str(graph), fix="open the artifact with pipeline.runtime.load")


def pack(neff: bytes, program: Any) -> bytes:
    """One graph as a zip whose bytes depend on its contents alone. `program` are NxD's trace artifacts.

    Flattener and packer are kept as NxDModel.save keeps them: the text of their plain attributes.
    """
    flattener, packer = program.flattener, program.packer
    layout = {
        "flattener": {name: str(getattr(flattener, name)) for name in ("layout", "exclude")},
        "packer": {name: str(getattr(packer, name)) for name in ("layout", "identifiers", "constants")},
    }
    metaneff = program.metaneff.SerializeToString(deterministic=True)
    parts = {NEFF: neff, METANEFF: metaneff, LAYOUT: json.dumps(layout, sort_keys=True).encode()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return buffer.getvalue()


def check_names(spec: GraphSpec, io: Signature, metaneff: Any) -> None:
    """Refuse a trace whose weights or state are not the signature's: NxD itself drops unknown names with a warning.

    A graph may lack weights that its phase does not use. Every state that it has must be aliased to an output.

    Raises:
        HostError: names what is unknown, has another shape, or would not be carried.

    """
    known = {dotted(one.name): one.shape for one in io.weights + io.state}
    states = {dotted(one.name) for one in io.state}
    faults, carried, kept = [], set(metaneff.output_aliases_to.values()), set()
    for place, one in enumerate(metaneff.input_tensors):
        name = key(one.checkpoint_key)
        if not name:
            continue
        if name not in known:
            faults.append(f"{name} is in the trace, but not in the shards")
        elif tuple(one.shape) != known[name]:
            faults.append(f"{name} is {list(one.shape)} in the trace, {list(known[name])} in the shards")
        elif place in carried:
            kept.add(name)
    faults += [f"{name} is aliased, but no state" for name in sorted(kept - states)]
    faults += [f"{name} is written, but not carried" for name in sorted(written(spec, io) - kept)]
    if faults:
        raise HostError("; ".join(faults), where=f"trace {spec.name}", fix="use a supported SDK, or report this")


def written(spec: GraphSpec, io: Signature) -> set[str]:
    """State that a phase writes: decode leaves a draft model's caches to its next catch-up."""
    names = {one.name for one in io.state}
    if spec.phase == "decode" and "draft/tail" in names:
        names = {name for name in names if not name.startswith("draft/") or name == "draft/tail"}
    return {dotted(name) for name in names}


def key(value: Any) -> str:
    """A name out of a metaneff, which holds bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def sdk_variables(target: str, lnc: int) -> dict[str, str]:
    """By which the SDK's own code learns the chip where there is none."""
    return {"NEURON_PLATFORM_TARGET_OVERRIDE": target, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}


@contextmanager
def sdk_environment(target: str, lnc: int) -> Iterator[None]:
    """Set `sdk_variables`; restored afterwards."""
    wanted = sdk_variables(target, lnc)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_operators: Callable[[tuple[tuple[str, str], ...]], str | None] = cache(
    lambda environment: compiler.supported_operators(dict(environment))
)
