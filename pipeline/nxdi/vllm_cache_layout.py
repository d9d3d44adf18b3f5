"""A compile cache of vLLM's Neuron plugin on disk: its entries, faults in them, and the files that another host needs.

The layout is that of the plugin's sources; see `vllm_cache.py`. A graph of the XLA route is `graph.hlo`. The native
route gives the compiler `module.mlir`: only a public description of its package says so, which names no other file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from pipeline.errors import no_string
from pipeline.files.limits import parse_json

NKI = "nki"
HLO, METADATA, COMPLETE = "graph.hlo", ".artifact_metadata_v0.json", ".compilation_complete"
STABLEHLO = "module.mlir"
Route = Literal["xla", "native"]
GRAPHS: dict[str, Route] = {STABLEHLO: "native", HLO: "xla"}
"""The compiler's input, and the route that wrote it; an entry with both is of the first."""

KEY = re.compile(r"[0-9a-f]{32}")
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.compilation_metadata(\.lock)?|[0-9a-f]{32}\.(tmp|trash)\..*")
"""Locks, and files of killed processes. The plugin treats an entry with a copied lock as an unfinished compile."""

OF_ONE_SERVER = re.compile(r"\.cache_accessed|([A-Za-z0-9_.-]*\.)?rank[0-9]+|[0-9a-f]{32}\.lock|.*\.tmp\.[0-9]+")
"""In an entry or among kernels: marks of use, working folders of ranks, locks, partial files."""


def entries(cache: Path, only: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Return the keys of the entries, and every reason why the folder is not a complete cache.

    `only`: the keys to return and check; empty: all.
    """
    no_string(only, "only", "keys")
    if cache.is_symlink() or not cache.is_dir():
        return [], ["no folder"]
    keys: list[str] = []
    faults: list[str] = []
    for path in sorted(cache.iterdir()):
        if KEY.fullmatch(path.name):
            if not only or path.name in only:
                keys.append(path.name)
                faults += entry_faults(path)
        elif path.name == NKI:
            faults += _kernel_faults(path)
        elif not TEMPORARY.fullmatch(path.name):
            faults.append(
                f"{path.name}: neither an entry nor kernels; supported: the layout with <key>/{HLO} or {STABLEHLO}"
            )
    return keys, faults if keys else [*faults, "no entry"]


def entry_faults(entry: Path) -> Iterator[str]:
    """Yield why an entry is not complete: files that the plugin looks for, and the sizes and keys that it recorded."""
    key = entry.name
    if entry.is_symlink() or not entry.is_dir():
        yield f"{key}: not a folder"
        return
    neff = entry / f"graph_{key}.neff"
    absent = [] if route_of(entry) else [f"{HLO} or {STABLEHLO}"]
    absent += [path.name for path in (neff, entry / METADATA, entry / COMPLETE) if not _has_content(path)]
    yield from (f"{key}: no {name}" for name in absent)
    yield from _links(entry)
    if absent:
        return
    recorded = re.search(rb"^neff_size:([0-9]+)$", (entry / COMPLETE).read_bytes(), re.MULTILINE)
    size, stated = str(neff.stat().st_size), recorded[1].decode().lstrip("0") if recorded else ""
    if recorded and stated != size:
        yield f"{key}: {neff.name} has {size} bytes, {COMPLETE} records {stated[:20]}"
    metadata_key = _json(entry / METADATA).get("cache_key")
    if metadata_key != key:
        yield f"{key}: {METADATA} has the key {metadata_key!r}"


def route_of(entry: Path) -> Route | None:
    """Return the route that lowered the graph of an entry; None without a graph."""
    return next((route for name, route in GRAPHS.items() if _has_content(entry / name)), None)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _kernel_faults(folder: Path) -> Iterator[str]:
    if folder.is_symlink() or not folder.is_dir():
        yield f"{NKI}: not a folder"
        return
    yield from _links(folder)
    for path in sorted(folder.glob("*.json")):
        if not _json(path):
            yield f"{NKI}/{path.name}: damaged"


def _links(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            yield f"{folder.name}/{path.relative_to(folder)}: a link, or not a plain file"


def listing(cache: Path, top: str) -> list[str]:
    """Return the files of an entry, or of the kernels, that another host needs."""
    names = (path.relative_to(cache) for path in sorted((cache / top).rglob("*")) if path.is_file())
    return [name.as_posix() for name in names if not any(map(OF_ONE_SERVER.fullmatch, name.parts[1:]))]


def _json(path: Path) -> dict[str, object]:
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
