"""Interface of a backend: a toolchain that traces and compiles graphs, and opens artifacts.

Backends never import each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.artifact.manifest import PairManifest
from pipeline.errors import HostError, Problem
from pipeline.extras import install_command
from pipeline.graphs.packing import Packing
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.recipe.backend_settings import BackendSettings

if TYPE_CHECKING:
    from torch import Tensor  # for annotations only: commands that only plan do not import torch

BACKENDS = {
    "inductor": "pipeline.backends.inductor.backend:InductorBackend",
    "neuron": "pipeline.backends.neuron.backend:NeuronBackend",
}
"""Name in a recipe -> import path of the class, imported on use."""

SDK = {"neuron": "install the Neuron SDK's packages (docs/how-to/neuron-host.md), then run: "}
"""Packages to install before a backend's extra, which contains no torch."""


@dataclass(frozen=True)
class Toolchain:
    """A backend's name and exact versions; part of every cache key."""

    backend: str
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, str]:
        """Return the flat form for locks and manifests."""
        return {"backend": self.backend, **self.versions}


@dataclass(frozen=True)
class TracedSubgraph:
    """A subgraph that occurs often in graphs, as `Traced`: compiled once, under its name."""

    name: str
    ir: bytes
    program: Any = field(repr=False, default=None)


@dataclass(frozen=True)
class Traced:
    """A traced graph: its canonical text (no paths, times, line numbers), its signature, the backend's own program.

    `program` stays inside the process that traced it; the cache key is computed from `ir`. `subgraphs` are compiled
    before the graph, once for all graphs.
    """

    ir: bytes
    signature: Signature
    program: Any = field(repr=False, default=None)
    subgraphs: tuple[TracedSubgraph, ...] = ()


def cache_key(traced: Traced | TracedSubgraph, toolchain: Toolchain, flags: Mapping[str, str]) -> str:
    """Return the sha256 of the canonical graph, the toolchain and the flags that change code, without weights."""
    settings = json.dumps({"toolchain": toolchain.as_dict(), "flags": dict(flags)}, sort_keys=True)
    return hashlib.sha256(traced.ir + b"\0" + settings.encode()).hexdigest()


CopyRow = Callable[[int, int, int], None]
"""Called with the row to copy from, the row to copy to, and the number of positions."""


class Ranks(Protocol):
    """An opened artifact on all its ranks; outputs are those of rank 0."""

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph on every rank; return its outputs by name, on the CPU."""
        ...

    def reset(self) -> None:
        """Zero all state."""
        ...

    @property
    def copy_row(self) -> CopyRow | None:
        """Copy the first positions of a row's caches, of both models, to another row; None: this backend cannot."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the live state by name if one rank in this process has all of it; else an empty dict."""
        ...

    def close(self) -> None:
        """End workers."""
        ...


class Backend(Protocol):
    """One toolchain. Implementations are stateless and cheap to construct."""

    packing: Packing
    graph_file: str
    """Name of a graph's file in an artifact."""
    preload: tuple[str, ...]
    """Modules that compile workers share (see `executors.local`)."""

    def toolchain(self) -> Toolchain:
        """Return the toolchain's name and exact versions."""
        ...

    def flags(self) -> dict[str, str]:
        """Return the settings of this recipe that change the generated code."""
        ...

    def requires(self) -> dict[str, str]:
        """Return what a host needs to run the result: instruction set, compute capability or chip."""
        ...

    def host(self) -> dict[str, str]:
        """Return this host's values of the keys of `requires`."""
        ...

    def preflight(self) -> list[Problem]:
        """Return what this machine lacks for a build."""
        ...

    def trace(self, spec: GraphSpec, pair: PairSpec) -> Traced:
        """Trace one graph on tensors without contents."""
        ...

    def compile_subgraph(self, subgraph: TracedSubgraph, work: Path) -> bytes:
        """Compile a subgraph to an object file, as `compile`."""
        ...

    def compile(self, traced: Traced, work: Path, objects: Path | None = None) -> bytes:
        """Compile without side effects; `work` is an empty directory for intermediate files.

        `objects` is the folder of the graph's compiled subgraphs, `<name>.o`.
        """
        ...

    def open(self, root: Path, manifest: PairManifest) -> Ranks:
        """Open an artifact whose files were verified, on all its ranks."""
        ...


def make_backend(settings: BackendSettings) -> Backend:
    """Return the backend of a recipe's `backend` section.

    Raises:
        HostError: its packages are not installed.

    """
    module, _, attribute = BACKENDS[settings.name].partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except ImportError as error:
        sdk = SDK.get(settings.name, "")
        what = f"backend {settings.name!r} needs the package {error.name}"
        raise HostError(what, where="backend", fix=f"{sdk}{install_command(settings.name)}") from error
    backend: Backend = factory(settings)
    return backend


def package_of(settings: BackendSettings) -> str:
    """Return the dotted name of a backend's package."""
    return BACKENDS[settings.name].partition(":")[0].rpartition(".")[0]
