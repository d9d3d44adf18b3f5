"""Compile one graph without a cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.backends.base import Backend, Traced
from pipeline.backends.inductor.backend import CONTAINER

CONTAINERS: dict[tuple[str, bytes], bytes] = {}
"""Object files of the container, which is the same in every graph of the same flags."""


def compile_graph(backend: Backend, traced: Traced, work: Path) -> bytes:
    """Compile the subgraphs of a graph in the empty folder `work`, then the graph; return its file."""
    objects = work / "subgraphs"
    objects.mkdir(parents=True)
    for subgraph in traced.subgraphs:
        key = (repr(backend.flags()), subgraph.ir)
        if (data := CONTAINERS.get(key)) is None:
            own = work / subgraph.name
            own.mkdir()
            data = backend.compile_subgraph(subgraph, own)
        if subgraph.name == CONTAINER:
            CONTAINERS[key] = data
        (objects / f"{subgraph.name}.o").write_bytes(data)
    return backend.compile(traced, work, objects if traced.subgraphs else None)
