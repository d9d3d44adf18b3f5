"""The artifact: a directory whose manifest lists every file. Reading, verifying, comparing. Imports no torch.

Paths in a manifest are never trusted, nothing outside the directory is opened, and links are refused. Signatures are
not checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
)

from pipeline.errors import ArtifactError, InputError
from pipeline.files.atomic import FileDigest, safe_relative, sha256_file
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.records import Record

if TYPE_CHECKING:
    from pipeline.graphs.spec import GraphSpec  # planning is not needed to pull

MANIFEST = "manifest.json"
SIGNATURE = "signature"
"""A signature over the manifest's bytes: beside it, and not listed in it."""
SCHEMA_VERSION = 1
HASHERS = 4
MAX_FILES = 100_000
ABOUT_THE_BUILD = ("provenance.json", "sbom.cdx.json", "reports/*")
"""Files that tell of one build, and are not part of what the artifact is."""

ALWAYS = ("recipe.*", "*config.json", "tokenizer/*")
"""What every part of an artifact comes with."""

CACHE_KIND = "vllm-compile-cache"

ISA_ORDER = ("default", "avx2", "avx512")
LOADED_WITH = ("torch", "cuda", "neuronx-cc", "neuronx-distributed")
"""Parts of a toolchain that loading needs too, in the same major.minor; the others only compiled."""

AGAIN = "pull or build the artifact again"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)]


class FileEntry(Record):
    """What pins a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class GraphEntry(Record):
    """A graph, the key it was compiled under, and its files."""

    name: str
    phase: Literal["prefill", "decode", "speculate", "score"]
    batch: int
    tokens: int
    kv: int
    draft_tokens: int
    sampling: Literal["greedy", "stochastic"]
    model: Literal["pair", "target", "draft"]
    key: str
    file: str
    io: str

    def spec(self) -> GraphSpec:
        """The graph's bucket."""
        from pipeline.graphs.spec import GraphSpec

        return GraphSpec(
            self.phase, self.batch, self.tokens, self.kv, self.draft_tokens, self.sampling, self.model
        )  # fmt: skip


class ShardEntry(Record):
    """One rank's weights of one model."""

    model: Literal["target", "draft"]
    rank: int
    file: str


class ShapesEntry(Record):
    """Buckets."""

    batch: tuple[int, ...]
    prefill: tuple[int, ...]
    kv: tuple[int, ...]


class Manifest(Record):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    created: str
    recipe_digest: str
    lock_digest: str
    toolchain: dict[str, str]
    backend: dict[str, Any]
    requires: dict[str, str]
    tensor: int
    dtype: str
    weights: Literal["int8"] | None = None
    shapes: ShapesEntry
    method: Literal["draft_model", "eagle3"] = "draft_model"
    draft_tokens: tuple[int, ...]
    step_costs: tuple[float, ...] | dict[int, tuple[float, ...]] | None = None
    lookup: int | None = Field(default=None, ge=1)
    sampling: tuple[str, ...]
    candidates: int | None
    vocab: int
    eos_ids: tuple[int, ...]
    graphs: tuple[GraphEntry, ...]
    shards: tuple[ShardEntry, ...]
    files: dict[str, FileEntry] = Field(max_length=MAX_FILES)
    validation: dict[str, Any] | None = None

    @property
    def passed(self) -> bool | None:
        """Verdict of the gates; None before they ran."""
        return None if self.validation is None else self.validation.get("passed") is True

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())


class CacheManifest(Manifest):
    """`manifest.json` of a compile cache of vLLM's Neuron plugin: it knows nothing of pairs, recipes and graphs."""

    kind: Literal["vllm-compile-cache"]
    recipe_digest: Literal[""] = Field(default="", exclude=True)
    lock_digest: Literal[""] = Field(default="", exclude=True)
    dtype: Literal[""] = Field(default="", exclude=True)
    shapes: ShapesEntry = Field(default=ShapesEntry(batch=(), prefill=(), kv=()), exclude=True)
    method: Literal["draft_model"] = Field(default="draft_model", exclude=True)
    draft_tokens: tuple[()] = Field(default=(), exclude=True)
    step_costs: None = Field(default=None, exclude=True)
    lookup: None = Field(default=None, exclude=True)
    sampling: tuple[()] = Field(default=(), exclude=True)
    candidates: None = Field(default=None, exclude=True)
    vocab: Literal[0] = Field(default=0, exclude=True)
    eos_ids: tuple[()] = Field(default=(), exclude=True)
    graphs: tuple[()] = Field(default=(), exclude=True)
    shards: tuple[()] = Field(default=(), exclude=True)


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
        if path.is_symlink():
            raise ArtifactError("the manifest is a link", where=str(path), fix=AGAIN)
        data = path.read_bytes()
    except OSError as error:
        what = "no artifact here" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
        raise ArtifactError(what, where=str(path), fix="name the directory that `tandem build` printed") from error
    return Artifact(root, parse(data, str(path)))


def parse(data: bytes, where: str) -> Manifest:
    """Manifest from its bytes.

    Raises:
        ArtifactError: damaged, of another schema version, or with paths that could leave the directory.

    """
    try:
        read_json = json.loads(data)
        version, kind = read_json.get("schema_version"), read_json.get("kind")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"damaged manifest: {error}", where=where, fix=AGAIN) from error
    if version != SCHEMA_VERSION:
        what = f"schema_version {version!r}, this Tandem reads {SCHEMA_VERSION}"
        raise ArtifactError(what, where=where, fix="use the version of Tandem that it was built with")
    try:
        manifest = (CacheManifest if kind == CACHE_KIND else Manifest).model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{place}: {first['msg']}", where=where, fix=AGAIN) from error
    faults = list(_path_faults(manifest, where))
    if faults:
        raise ArtifactError("; ".join(faults), where=where, fix="do not use this artifact")
    return manifest


def dump(manifest: Record) -> bytes:
    """The manifest's bytes; equal manifests give equal bytes."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"


def content_digest(manifest: Manifest) -> str:
    """sha256 of what an artifact is and does: not of when it was built, what its version is, or how its gates went.

    Two builds of the same inputs have the same content digest.
    """
    data = manifest.model_dump(mode="json", exclude={"version", "created", "validation"})
    data["files"] = {name: entry for name, entry in data["files"].items() if not _matches(name, ABOUT_THE_BUILD)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def part(manifest: Manifest, only: Sequence[str] | None, where: str) -> tuple[str, ...] | None:
    """Patterns of a part of an artifact: those that were asked for, and what every part comes with; None for all.

    Raises:
        InputError: one matches nothing; says what there is.

    """
    for pattern in only or ():
        if not select(manifest, [pattern]):
            tops = ", ".join(sorted({name.partition("/")[0] for name in manifest.files}))
            raise InputError(f"no file matches {pattern}", where=where, fix=f"it has {tops}")
    return (*only, *ALWAYS) if only else None


def select(manifest: Manifest, only: Sequence[str] | None) -> dict[str, FileEntry]:
    """Files that match one of the patterns (`weights/*/rank-0-*`); all where there are none."""
    return {name: entry for name, entry in manifest.files.items() if only is None or _matches(name, only)}


def verify(root: Path, progress: ByteProgress = no_byte_progress, *, only: Sequence[str] | None = None) -> Artifact:
    """Check every file's size and sha256, and that nothing is missing or extra; with `only`, of a part that was pulled.

    Raises:
        ArtifactError: every fault, naming each path and both values.

    """
    artifact = read(root)
    listed = select(artifact.manifest, only)
    found = {path.relative_to(root).as_posix(): path for path in _walk(root)}
    for name in (MANIFEST, SIGNATURE):
        if name in found and not _odd_kind(found[name]):
            found.pop(name)
    faults = [f"{name}: missing" for name in listed.keys() - found.keys()]
    faults += [f"{name}: not in the manifest" for name in found.keys() - listed.keys()]
    faults += [f"{name}: {kind}" for name, path in found.items() if (kind := _odd_kind(path))]
    sound = {name: entry for name, entry in listed.items() if name in found and not _odd_kind(found[name])}
    faults += differences(root, sound, progress)
    if faults:
        raise ArtifactError("; ".join(sorted(faults)), where=str(root), fix=AGAIN)
    return artifact


def difference(path: Path, entry: FileEntry | FileDigest) -> str | None:
    """How a file differs from what it should be, with both values; None if it does not."""
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes, should be {entry.size}"
    sha256 = sha256_file(path)
    if sha256 != entry.sha256:
        return f"sha256 {sha256}, should be {entry.sha256}"
    return None


def check_host(
    manifest: Manifest, host: Mapping[str, str], *, toolchain: Mapping[str, str] | None = None, ranks: int | None = None
) -> None:  # fmt: skip
    """Refuse an artifact made for another machine.

    `host` is what this machine has, in the words of `requires`; `isa` is satisfied by a larger instruction set.
    `toolchain` and `ranks` are checked where they are given.

    Raises:
        ArtifactError: names each field with both values.

    """
    faults = [
        f"{field}: the artifact needs {needed}, this host has {host.get(field, 'none')}"
        for field, needed in manifest.requires.items()
        if not satisfies(field, needed, host.get(field))
    ]
    if ranks is not None and ranks != manifest.tensor:
        faults.append(f"tensor: the artifact needs {manifest.tensor} ranks, there are {ranks}")
    for field in ("backend", *LOADED_WITH):
        built, here = manifest.toolchain.get(field), (toolchain or {}).get(field)
        if toolchain is not None and built is not None and _minor(built) != _minor(here):
            faults.append(f"toolchain.{field}: built with {built}, this host has {here or 'none'}")
    if faults:
        where = f"{manifest.name}@{manifest.version}"
        raise ArtifactError("; ".join(faults), where=where, fix="pull the variant for this host, or build here")


def check_replaceable(out: Path) -> None:
    """Refuse to replace a directory that holds anything but an artifact.

    Raises:
        InputError: names the directory.

    """
    if os.path.ismount(out):
        what = "this folder is a mount point, which cannot be replaced in one step"
        raise InputError(what, where=str(out), fix=f"name a folder inside it, for example {out / 'artifact'}")
    if out.is_file():
        raise InputError("a file is in the way of the artifact", where=str(out), fix="name a new folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError("this folder holds something else than an artifact", where=str(out), fix="name a new folder")


def _path_faults(manifest: Manifest, where: str) -> Iterator[str]:
    names = manifest.files.keys()
    for name in names:
        try:
            parents = {parent.as_posix() for parent in safe_relative(name, where).parents}
        except ArtifactError as error:
            yield error.what
            continue
        if name in (MANIFEST, SIGNATURE) or parents & names:
            yield f"path {name!r} is also the manifest, its signature, or lies inside a file"
    used = [path for graph in manifest.graphs for path in (graph.file, graph.io)] + [s.file for s in manifest.shards]
    for name in used:
        if name not in names:
            yield f"path {name!r} is used but not listed in files"


def _walk(root: Path) -> Iterator[Path]:
    """Everything below `root` that is not a plain folder; links are not followed."""
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in [*names, *links])


def _odd_kind(path: Path) -> str | None:
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    return f"a link to {path.readlink()}" if stat.S_ISLNK(mode) else "not a plain file"


def differences(root: Path, listed: Mapping[str, FileEntry], progress: ByteProgress = no_byte_progress) -> list[str]:
    """Hash in threads, the largest first: hashlib lets go of the interpreter."""
    total, done, faults = sum(entry.size for entry in listed.values()), 0, []
    with ThreadPoolExecutor(HASHERS, "verify") as pool:
        order = sorted(listed, key=lambda name: -listed[name].size)
        running = {pool.submit(difference, root / name, listed[name]): name for name in order}
        for future in as_completed(running):
            name = running[future]
            if what := future.result():
                faults.append(f"{name}: {what}")
            done += listed[name].size
            progress(done, total)
    return faults


def satisfies(field: str, needed: str, have: str | None) -> bool:
    """Whether a host's value fulfils one of `requires`."""
    if field == "isa" and needed in ISA_ORDER and have in ISA_ORDER:
        return ISA_ORDER.index(have) >= ISA_ORDER.index(needed)
    return have == needed


def _minor(version: str | None) -> list[str] | None:
    return None if version is None else version.split("+")[0].split(".")[:2]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
