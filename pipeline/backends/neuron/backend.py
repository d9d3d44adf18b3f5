"""The Neuron backend: trace a graph through NxD's ModelBuilder, compile it to a NEFF. Runs on any host with the SDK."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks, Toolchain, Traced
from pipeline.backends.neuron import compiler, hlo, support
from pipeline.backends.neuron.graph_file import GRAPH_FILE, pack
from pipeline.backends.neuron.module import NeuronModule, NeuronSeams, dotted, key
from pipeline.backends.neuron.runtime import NeuronRanks
from pipeline.backends.neuron.support import sdk_environment, sdk_variables
from pipeline.errors import HostError, Problem
from pipeline.graphs.packing import PACKINGS, Packing
from pipeline.graphs.signature import Signature, signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.recipe.schema import NeuronSettings


class NeuronBackend:
    """NEFFs for Trainium and Inferentia 2."""

    graph_file = GRAPH_FILE

    def __init__(self, settings: NeuronSettings) -> None:
        self.target, self.lnc, self.extra = settings.target, settings.lnc, dict(settings.flags)
        self.packing: Packing = PACKINGS[settings.packing]

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

    def open(self, root: Path, manifest: PairManifest) -> Ranks:
        """All ranks as one NxDModel on this host's device."""
        return NeuronRanks(root, manifest, self.target, self.lnc)


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


_operators: Callable[[tuple[tuple[str, str], ...]], str | None] = cache(
    lambda environment: compiler.supported_operators(dict(environment))
)
