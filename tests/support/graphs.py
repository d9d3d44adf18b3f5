"""Compile one graph without a cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.backends.base import Backend, Traced


def compile_graph(backend: Backend, traced: Traced, work: Path) -> bytes:
    """Compile the parts of a graph in the empty folder `work`, then the graph; return its file."""
    objects = work / "parts"
    objects.mkdir(parents=True)
    for part in traced.parts:
        own = work / part.name
        own.mkdir()
        (objects / f"{part.name}.o").write_bytes(backend.compile_part(part, own))
    return backend.compile(traced, work, objects if traced.parts else None)
