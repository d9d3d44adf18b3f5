"""The artifact: a directory whose manifest lists every file. Reading, verifying, comparing. Imports no torch.

Paths in a manifest are never trusted; nothing outside the directory is ever opened; links are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ArtifactError
from pipeline.files import digest_file, safe_relative
from pipeline.plan import GraphSpec

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

Progress = Callable[[int, int], None]
"""Called with bytes checked and bytes in all."""


class Part(BaseModel):
    """Base of the manifest's sections."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Part):
    """What pins a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class GraphEntry(Part):
    """A graph and the key it was compiled under."""

    phase: Literal["prefill", "decode", "speculate", "score"]
    batch: int
    tokens: int
    kv: int
    draft_tokens: int
    sampling: Literal["greedy", "stochastic"]
    model: Literal["pair", "target", "draft"]
    key: str

    def spec(self) -> GraphSpec:
        """The graph's bucket."""
        return GraphSpec(
            self.phase, self.batch, self.tokens, self.kv, self.draft_tokens, self.sampling, self.model
        )  # fmt: skip


class ShapesEntry(Part):
    """Buckets."""

    batch: tuple[int, ...]
    prefill: tuple[int, ...]
    kv: tuple[int, ...]


class Manifest(Part):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    name: str
    version: str
    created: str
    recipe_digest: str
    lock_digest: str
    toolchain: dict[str, str]
    backend: dict[str, Any]
    requires: dict[str, str]
    tensor: int
    dtype: str
    shapes: ShapesEntry
    draft_tokens: tuple[int, ...]
    sampling: tuple[str, ...]
    candidates: int | None
    eos_ids: tuple[int, ...]
    graphs: tuple[GraphEntry, ...]
    files: dict[str, FileEntry]
    validation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Artifact:
    """A directory and its parsed manifest; not verified yet."""

    root: Path
    manifest: Manifest


def read(root: Path) -> Artifact:
    """Parse the manifest; opens nothing else.

    Raises:
        ArtifactError: none here, another schema version, or an unsafe path in it.
    """
    path = root / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        version = data.get("schema_version")
    except (OSError, ValueError, AttributeError) as error:
        what = "no artifact here" if isinstance(error, FileNotFoundError) else f"unreadable manifest: {error}"
        raise ArtifactError(what, where=str(path), fix="name the directory that `tandem build` printed") from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"schema_version {version!r}, this Tandem reads {SCHEMA_VERSION}", where=str(path), fix="use a matching version"
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{place}: {first['msg']}", where=str(path), fix="pull or build the artifact again") from error
    for name in manifest.files:
        safe_relative(name, str(path))
    return Artifact(root, manifest)


def verify(root: Path, progress: Progress = lambda done, total: None) -> Artifact:
    """Check every file's size and sha256, and that nothing is missing or extra.

    Raises:
        ArtifactError: the first kind of fault, naming each path and both values.
    """
    artifact = read(root)
    found = {p.relative_to(root).as_posix(): p for p in _walk(root)}
    found.pop(MANIFEST, None)
    faults = [f"{name}: a link" for name, path in found.items() if path.is_symlink()]
    faults += [f"{name}: missing" for name in artifact.manifest.files.keys() - found.keys()]
    faults += [f"{name}: not in the manifest" for name in found.keys() - artifact.manifest.files.keys()]
    total, done = sum(entry.size for entry in artifact.manifest.files.values()), 0
    for name, entry in artifact.manifest.files.items() if not faults else ():
        faults += _compare(name, found[name], entry)
        done += entry.size
        progress(done, total)
    if faults:
        raise ArtifactError("; ".join(sorted(faults)), where=str(root), fix="pull or build the artifact again")
    return artifact


def check_host(manifest: Manifest, host: Mapping[str, str]) -> None:
    """Refuse an artifact made for another machine.

    `host` is what this machine has, in the words of `requires`; `isa` is satisfied by a larger instruction set.

    Raises:
        ArtifactError: names each field with both values.
    """
    order = {"default": 0, "avx2": 1, "avx512": 2}
    faults = []
    for field, needed in manifest.requires.items():
        have = host.get(field, "nothing")
        if field == "isa" and needed in order and have in order and order[have] >= order[needed]:
            continue
        if have != needed:
            faults.append(f"{field}: the artifact needs {needed}, this host has {have}")
    if faults:
        raise ArtifactError("; ".join(faults), where=manifest.name, fix="pull the variant for this host, or build here")


def diff(first: Manifest, second: Manifest) -> dict[str, Any]:
    """What differs between two artifacts: fields with both values, files added, removed, changed."""
    a, b = first.model_dump(mode="json"), second.model_dump(mode="json")
    skip = {"files", "created", "version"}
    changed = {k: {"from": a[k], "to": b[k]} for k in a if k not in skip and a[k] != b[k]}
    both = a["files"].keys() & b["files"].keys()
    return {
        "fields": changed,
        "files": {
            "added": sorted(b["files"].keys() - a["files"].keys()),
            "removed": sorted(a["files"].keys() - b["files"].keys()),
            "changed": sorted(name for name in both if a["files"][name] != b["files"][name]),
        },
    }


def dump(manifest: Manifest) -> bytes:
    """The manifest's bytes; equal manifests give equal bytes."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in [*names, *links]]
    return found


def _compare(name: str, path: Path, entry: FileEntry) -> list[str]:
    size = path.stat().st_size
    if size != entry.size:
        return [f"{name}: {size} bytes, the manifest says {entry.size}"]
    sha256 = digest_file(path).sha256
    if sha256 != entry.sha256:
        return [f"{name}: sha256 {sha256[:12]}..., the manifest says {entry.sha256[:12]}..."]
    return []
