"""A compile cache of vLLM's Neuron plugin on disk: is it whole, and which of its files mean something elsewhere.

The layout is that of the plugin's sources; see `vllm_cache.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

NKI = "nki"
HLO, METADATA, COMPLETE = "graph.hlo", ".artifact_metadata_v0.json", ".compilation_complete"
KEY = re.compile(r"[0-9a-f]{32}")
PASSING = re.compile(r"\.[0-9a-f]{32}\.compilation_metadata(\.lock)?|[0-9a-f]{32}\.(tmp|trash)\..*")
"""Locks, and what killed processes left. Where a lock travels, the plugin takes its entry for a dead compile's."""

OF_ONE_SERVER = re.compile(r"\.cache_accessed|([A-Za-z0-9_.-]*\.)?rank[0-9]+|[0-9a-f]{32}\.lock|.*\.tmp\.[0-9]+")
"""In an entry or among kernels: marks of use, folders in which a rank compiled, locks, half-written files."""


def entries(cache: Path) -> tuple[list[str], list[str]]:
    """Names of the entries, and what keeps the plugin, or us, from taking the folder for a whole cache."""
    if cache.is_symlink() or not cache.is_dir():
        return [], ["no folder is here"]
    keys: list[str] = []
    faults: list[str] = []
    for one in sorted(cache.iterdir()):
        if KEY.fullmatch(one.name):
            keys.append(one.name)
            faults += entry_faults(one)
        elif one.name == NKI:
            faults += _kernel_faults(one)
        elif not PASSING.fullmatch(one.name):
            faults.append(f"{one.name}: neither an entry nor kernels; only the layout with <key>/graph.hlo is known")
    return keys, faults if keys else [*faults, "no entry"]


def entry_faults(entry: Path) -> Iterator[str]:
    """Why an entry is not complete: what the plugin looks for, and that sizes and keys are those it wrote down."""
    key = entry.name
    if entry.is_symlink() or not entry.is_dir():
        yield f"{key}: not a folder"
        return
    neff = entry / f"graph_{key}.neff"
    wanted = (entry / HLO, neff, entry / METADATA, entry / COMPLETE)
    absent = [one.name for one in wanted if not one.is_file() or not one.stat().st_size]
    yield from (f"{key}: no {name}" for name in absent)
    yield from _links(entry)
    if absent:
        return
    found = re.search(rb"^neff_size:([0-9]+)$", (entry / COMPLETE).read_bytes(), re.MULTILINE)
    if found and int(found[1]) != neff.stat().st_size:
        yield f"{key}: {neff.name} has {neff.stat().st_size} bytes, {COMPLETE} says {int(found[1])}"
    inside = _json(entry / METADATA).get("cache_key")
    if inside != key:
        yield f"{key}: {METADATA} is of the key {inside!r}"


def _kernel_faults(folder: Path) -> Iterator[str]:
    if folder.is_symlink() or not folder.is_dir():
        yield f"{NKI}: not a folder"
        return
    yield from _links(folder)
    for one in sorted(folder.glob("*.json")):
        if not _json(one):
            yield f"{NKI}/{one.name}: damaged"


def _links(folder: Path) -> Iterator[str]:
    for one in sorted(folder.rglob("*")):
        if one.is_symlink() or not (one.is_dir() or one.is_file()):
            yield f"{folder.name}/{one.relative_to(folder)}: a link, or not a plain file"


def listing(cache: Path, top: str) -> list[str]:
    """Files of an entry, or of the kernels, that mean something elsewhere."""
    names = (one.relative_to(cache) for one in sorted((cache / top).rglob("*")) if one.is_file())
    return [name.as_posix() for name in names if not any(map(OF_ONE_SERVER.fullmatch, name.parts[1:]))]


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
