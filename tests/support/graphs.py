"""Compile one graph without a cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.backends.base import Backend, Traced


def compile_graph(backend: Backend, traced: Traced, work: Path) -> bytes:
    """Compile the subgraphs of a graph in the empty folder `work`, then the graph; return its file."""
    objects = work / "subgraphs"
    objects.mkdir(parents=True)
    for subgraph in traced.subgraphs:
        own = work / subgraph.name
        own.mkdir()
        (objects / f"{subgraph.name}.o").write_bytes(backend.compile_subgraph(subgraph, own))
    return backend.compile(traced, work, objects if traced.subgraphs else None)
