"""What a backend is: a toolchain that traces, compiles and loads graphs. Backends never import each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifact.manifest import CACHE_KIND
from pipeline.errors import HostError, Problem
from pipeline.graphs.packing import Packing
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec, PairSpec

BACKENDS = {
    "inductor": "pipeline.backends.inductor.backend:InductorBackend",
    "neuron": "pipeline.backends.neuron.backend:NeuronBackend",
}


@dataclass(frozen=True)
class Toolchain:
    """A backend's name and exact versions; part of every cache key."""

    backend: str
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, str]:
        """Flat form for locks and manifests."""
        return {"backend": self.backend, **self.versions}


@dataclass(frozen=True)
class Traced:
    """A traced graph: its canonical text (no paths, times, line numbers), its signature, the backend's own program.

    `program` stays inside the process that traced it; `ir` is what the cache key is made of. A graph that is `repeated`
    runs at every step of a generation, and is worth more time to compile.
    """

    ir: bytes
    signature: Signature
    program: Any = field(repr=False, default=None)
    repeated: bool = False


def cache_key(traced: Traced, toolchain: Toolchain, flags: Mapping[str, str]) -> str:
    """sha256 of the canonical graph, the toolchain and the flags that change code. Weights are not in it."""
    settings = json.dumps({"toolchain": toolchain.as_dict(), "flags": dict(flags)}, sort_keys=True)
    return hashlib.sha256(traced.ir + b"\0" + settings.encode()).hexdigest()


class Executable(Protocol):
    """A loaded graph."""

    def run(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Take tensors in signature order, update the state among them in place, return the outputs."""
        ...


class Backend(Protocol):
    """One toolchain. Implementations are stateless and cheap to construct."""

    packing: Packing
    graph_file: str
    """Name of a graph's file in an artifact."""

    def toolchain(self) -> Toolchain:
        """Name and exact versions."""
        ...

    def flags(self) -> dict[str, str]:
        """Settings of this recipe that change the code produced."""
        ...

    def requires(self) -> dict[str, str]:
        """What a host must have to run the result: instruction set, compute capability or chip."""
        ...

    def host(self) -> dict[str, str]:
        """What this host has, in the words of `requires`."""
        ...

    def preflight(self) -> list[Problem]:
        """What is missing on this machine, before any work starts."""
        ...

    def trace(self, spec: GraphSpec, pair: PairSpec) -> Traced:
        """Trace one graph on tensors without contents."""
        ...

    def compile(self, traced: Traced, work: Path) -> bytes:
        """Compile; pure. `work` is an empty directory for intermediate files."""
        ...

    def load(self, graph: Path) -> Executable:
        """Open a verified graph file."""
        ...


def make_backend(settings: Mapping[str, Any]) -> Backend:
    """The backend that a recipe's `backend` section names.

    Raises:
        HostError: it is not part of this version, or its packages are not installed.

    """
    name = settings["name"]
    if name == "nxdi":
        what, fix = (
            "a package of NxD Inference, which vLLM runs",
            "tandem vllm-args ARTIFACT prints how",
        )
        raise HostError(what, where="backend", fix=fix)
    if name == CACHE_KIND:
        what, fix = "a compile cache of vLLM's Neuron plugin", "tandem vllm-cache install ARTIFACT"
        raise HostError(what, where="backend", fix=fix)
    if name not in BACKENDS:
        raise HostError(
            f"backend {name!r} cannot build or run here", where="backend", fix=f"available: {', '.join(BACKENDS)}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except ImportError as error:
        raise HostError(
            f"backend {name!r} needs {error.name}", where="backend", fix=f"pip install 'tandem[{name}]'"
        ) from error
    backend: Backend = factory(**{key: value for key, value in settings.items() if key != "name"})
    return backend
