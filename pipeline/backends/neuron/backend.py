"""The Neuron backend: trace a graph through NxD's ModelBuilder, compile it to a NEFF. Runs on any host with the SDK."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks, Toolchain, Traced, TracedSubgraph
from pipeline.backends.neuron import compiler, hlo, support
from pipeline.backends.neuron.graph_file import GRAPH_FILE, NeuronTrace, StableHloTrace, pack
from pipeline.backends.neuron.module import NeuronModule, NeuronSeams, dotted, key, without_booleans
from pipeline.backends.neuron.runtime import NeuronRanks
from pipeline.backends.neuron.support import sdk_environment, sdk_variables
from pipeline.errors import HostError, Problem
from pipeline.extras import require
from pipeline.graphs.packing import PACKINGS, Packing
from pipeline.graphs.signature import Signature, signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.recipe.backend_settings import NeuronSettings

CONTEXT_PHASES = ("prefill", "score")
"""Phases whose graphs read whole prompts; the others are steps."""


class NeuronBackend:
    """NEFFs for Trainium and Inferentia 2."""

    graph_file = GRAPH_FILE
    preload = ()  # torch-neuronx and XLA start threads

    def __init__(self, settings: NeuronSettings) -> None:
        self.target, self.lnc, self.extra = settings.target, settings.lnc, dict(settings.flags)
        self.frontend = settings.frontend
        self.packing: Packing = PACKINGS[settings.packing]

    def toolchain(self) -> Toolchain:
        """Return versions of the packages that trace and compile; `missing` for those not installed."""
        return Toolchain("neuron", support.versions(self.frontend))

    def flags(self) -> dict[str, str]:
        """Return the compiler's flags, and the environment that changes the result of tracing and compiling."""
        code = {
            f"neuronx-cc {kind}": shlex.join(compiler.arguments(self.target, self.lnc, self.extra, kind))
            for kind in compiler.KINDS
        }
        frontend = {} if self.frontend == "xla" else {"frontend": self.frontend}
        return code | frontend | {f"env.{name}": value for name, value in support.environment().items()}

    def requires(self) -> dict[str, str]:
        """Return the chip and the size of logical cores that a NEFF needs."""
        return {"device": "neuron", "chip": self.target, "lnc": str(self.lnc)}

    def host(self) -> dict[str, str]:
        """Return this host's values of the keys of `requires`."""
        device = support.device()
        if device is None:
            return {"device": "none"}
        return {"device": "neuron", "chip": device.chip, "lnc": str(device.lnc)}

    def preflight(self) -> list[Problem]:
        """Return what this host lacks for a build: packages, versions, compiler, environment, flags."""
        reserved = sorted({name.lstrip("-") for name in self.extra} & compiler.OWN_FLAGS)
        own = [Problem("backend.flags", f"{name} cannot be set by a recipe", "remove it") for name in reserved]
        if self.frontend == "stablehlo":
            return own + support.stablehlo_problems(self.target, self.lnc, support.versions(self.frontend))
        return own + support.problems(self.target, self.lnc, support.versions())

    def trace(self, spec: GraphSpec, pair: PairSpec) -> Traced:
        """Trace one graph for all ranks, with no device, and check its names and state against the shards."""
        io = without_booleans(signature(spec, pair, self.packing))
        if self.frontend == "stablehlo":
            return self._trace_stablehlo(spec, pair, io)
        with sdk_environment(self.target, self.lnc):
            from neuronx_distributed import (
                ModelBuilder,
                NxDParallelState,
            )  # not at the top: the import reads the chip from the environment

            with NxDParallelState(
                world_size=pair.models.tp, tensor_model_parallel_size=pair.models.tp, lnc_size=self.lnc
            ):
                module = NeuronModule(spec, pair, io, NeuronSeams)
                builder = ModelBuilder(module)
                builder.trace(kwargs=module.example(), tag=spec.name)
                traced = builder.trace_artifacts_collection[spec.name]
        check_names(spec, io, traced.metaneff)
        program = NeuronTrace(spec, traced.hlo, traced.metaneff, traced.flattener, traced.packer)
        return Traced(hlo.canonical(traced.hlo, traced.metaneff), io, program)

    def _trace_stablehlo(self, spec: GraphSpec, pair: PairSpec, io: Signature) -> Traced:
        require(["stablehlo"], "backend.frontend")
        from pipeline.backends.neuron import stablehlo  # needs packages that the other frontend does without

        group = replica_group(self.target, self.lnc, pair.models.tp)
        lowered = stablehlo.trace(spec, pair, io, group)
        unaliased = sorted(written(spec, io) - lowered.boundary.aliased)
        _refuse([f"{name} is written but not aliased" for name in unaliased], spec)
        ir = b"stablehlo\n" + hlo.stripped(lowered.hlo) + lowered.boundary.to_json()
        return Traced(ir, io, StableHloTrace(spec, lowered.hlo, lowered.boundary))

    def compile_subgraph(self, subgraph: TracedSubgraph, work: Path) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Not called: a graph has no subgraphs, because the compiler finds repeated layers itself (modular flow)."""
        raise AssertionError(f"a Neuron graph has no subgraphs, found {subgraph.name}")

    def compile(self, traced: Traced, work: Path, objects: Path | None = None) -> bytes:  # noqa: ARG002 - no subgraphs
        """Compile with neuronx-cc; return the graph file."""
        environment = support.AT_START | sdk_variables(self.target, self.lnc)
        program: NeuronTrace | StableHloTrace = traced.program
        if faults := hlo.faults(program.hlo):
            problem = f"neuronx-cc does not support this graph: {'; '.join(faults)}"
            raise HostError(problem, where="compile", fix="please report this bug of Tandem")
        listing = _operators(tuple(environment.items()))
        unlisted = hlo.unlisted(program.hlo, hlo.DOCUMENTED if listing is None else hlo.operators(listing))
        if unlisted:  # into the graph's log: published lists lag behind the compiler, which decides
            warnings.warn(f"not in neuronx-cc's list of operators: {', '.join(unlisted)}", stacklevel=2)
        kind: compiler.Kind = "context" if program.spec.phase in CONTEXT_PHASES else "step"
        flags = compiler.arguments(self.target, self.lnc, self.extra, kind, program.spec.kv)
        try:
            return pack(compiler.compile_neff(hlo.stripped(program.hlo), flags, work, environment), program)
        except HostError as error:
            if not unlisted:
                raise
            what = f"{error.what}; the compiler's list of operators lacks {', '.join(unlisted)}"
            raise HostError(what, where=error.where, fix=error.fix) from error

    def open(self, root: Path, manifest: PairManifest) -> Ranks:
        """Open all ranks as one NxDModel on this host's device."""
        return NeuronRanks(root, manifest, self.target, self.lnc)


def check_names(spec: GraphSpec, io: Signature, metaneff: Any) -> None:
    """Reject a trace whose weights or state differ from the signature: NxD only warns about unknown names.

    A graph may lack weights that its phase does not use. Each state that a phase writes must be aliased to an output.

    Raises:
        HostError: lists names that are unknown, have another shape, or are not aliased.

    """
    shapes = {dotted(tensor.name): tensor.shape for tensor in io.weights + io.state}
    states = {dotted(tensor.name) for tensor in io.state}
    faults, aliased_inputs, aliased = [], set(metaneff.output_aliases_to.values()), set()
    for index, tensor in enumerate(metaneff.input_tensors):
        name = key(tensor.checkpoint_key)
        if not name:
            continue
        if name not in shapes:
            faults.append(f"{name} is in the trace but not in the shards")
        elif tuple(tensor.shape) != shapes[name]:
            faults.append(f"{name} is {list(tensor.shape)} in the trace, {list(shapes[name])} in the shards")
        elif index in aliased_inputs:
            aliased.add(name)
    faults += [f"{name} is aliased but is not state" for name in sorted(aliased - states)]
    faults += [f"{name} is written but not aliased" for name in sorted(written(spec, io) - aliased)]
    _refuse(faults, spec)


def _refuse(faults: list[str], spec: GraphSpec) -> None:
    """Reject a trace that has faults.

    Raises:
        HostError: lists them.

    """
    if faults:
        raise HostError("; ".join(faults), where=f"trace {spec.name}", fix="use a supported SDK, or report this bug")


def replica_group(chip: str, lnc: int, ranks: int) -> list[int]:
    """Return the ranks in the order of their group: with lnc=1 on trn2, NxD's 64 ranks follow the rows of the chips."""
    if chip == "trn2" and lnc == 1 and ranks == 64:
        return [*range(16), *range(48, 64), *range(16, 48)]
    return list(range(ranks))


def written(spec: GraphSpec, io: Signature) -> set[str]:
    """Return the state that a phase writes.

    Decode and verify do not write a draft model's caches; propose writes caches alone.
    """
    names = {tensor.name for tensor in io.state}
    if spec.phase == "propose":
        names -= {"draft/tail", "draft/feature"}
    elif spec.phase in ("decode", "verify") and "draft/tail" in names:
        names = {name for name in names if not name.startswith("draft/") or name == "draft/tail"}
    return {dotted(name) for name in names}


_operators: Callable[[tuple[tuple[str, str], ...]], str | None] = cache(
    lambda environment: compiler.supported_operators(dict(environment))
)
