"""Compare an artifact's files with its manifest, and its requirements with a host. Opens nothing for execution.

Nothing outside the directory is opened, and links are rejected. Signatures are not checked here.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from pipeline.artifact.manifest import ALWAYS, BESIDE, MANIFEST, Artifact, FileEntry, Manifest, read, select
from pipeline.artifact.manifest import part as part_of
from pipeline.artifact.pulled import pull_record
from pipeline.errors import ArtifactError, CorruptError, InputError, no_string
from pipeline.files.atomic import FileDigest, sha256_file
from pipeline.files.limits import AGAIN
from pipeline.progress import ByteProgress, no_byte_progress

HASHERS = 4
NAMED = 5
"""Missing files that an error names."""
ISA_ORDER = ("default", "avx2", "avx512")
LOADED_WITH = ("torch", "cuda", "neuronx-cc", "neuronx-distributed")
"""Parts of a toolchain that loading requires, in the same major.minor; the others are for compiling."""

OUTSIDE = "not in the part that is verified"


def verify(root: Path, progress: ByteProgress = no_byte_progress, *, only: Sequence[str] | None = None) -> Artifact:
    """Check size and sha256 of every file, and that no file is missing or extra; with `only`, of a pulled part.

    Raises:
        CorruptError: every fault, each with its path and both values; of many missing files, the first.
        ArtifactError: the record of the pull says that only a part was pulled.

    """
    no_string(only, "only", "patterns")
    return verify_files(read(root), progress, only=only)


def verify_files(
    artifact: Artifact, progress: ByteProgress = no_byte_progress, *, only: Sequence[str] | None = None
) -> Artifact:
    """Check as `verify`, against a manifest that was read before; return the artifact."""
    no_string(only, "only", "patterns")
    root = artifact.root
    listed = select(artifact.manifest, only)
    paths = {path.relative_to(root).as_posix(): path for path in _walk(root)}
    for name in BESIDE:
        if name in paths and not _odd_kind(paths[name]):
            paths.pop(name)
    missing = listed.keys() - paths.keys()
    not_pulled = missing - select(artifact.manifest, part).keys() if (part := _part(artifact, missing, only)) else set()
    faults = _missing(missing - not_pulled)
    unlisted, known = paths.keys() - listed.keys(), artifact.manifest.files.keys()
    outside = unlisted & known
    faults += [f"{name}: {OUTSIDE if name in known else 'not in the manifest'}" for name in unlisted]
    faults += [f"{name}: {kind}" for name, path in paths.items() if (kind := _odd_kind(path))]
    sound = {name: entry for name, entry in listed.items() if name in paths and not _odd_kind(paths[name])}
    faults += differences(root, sound, progress)
    if faults:
        what = "; ".join(sorted(faults))
        if len(faults) == len(outside):
            raise ArtifactError(what, where=str(root), fix="omit --only to verify the whole artifact")
        raise CorruptError(what, where=str(root), fix=AGAIN)
    if not_pulled:
        raise _incomplete(root, len(listed), not_pulled, part or ())
    return artifact


def _part(artifact: Artifact, missing: AbstractSet[str], only: Sequence[str] | None) -> Sequence[str] | None:
    """Return the patterns of the part that was pulled, if files are missing from an artifact that is checked whole."""
    record = pull_record(artifact.root, artifact.data) if missing and only is None and artifact.data else None
    return None if record is None else part_of(artifact.manifest, record.only, str(artifact.root))


def _missing(names: AbstractSet[str]) -> list[str]:
    """Return the faults of missing files, the first of them by name."""
    first, others = sorted(names)[:NAMED], len(names) - NAMED
    return [*(f"{name}: missing" for name in first), *([f"{others} other files: missing"] if others > 0 else [])]


def _incomplete(root: Path, files: int, missing: AbstractSet[str], part: Sequence[str]) -> ArtifactError:
    """Return the error for a whole check of an artifact of which only a part was pulled."""
    options = " ".join(f"--only {shlex.quote(_short(of))}" for of in part if of not in ALWAYS)
    what = f"only a part was pulled ({options}): {len(missing)} of {files} files are not here"
    check = f"`tandem verify {shlex.quote(str(root))} {options}` checks that part"
    return ArtifactError(what, where=str(root), fix=f"{check}; pull it without --only to have all files")


def _short(pattern: str) -> str:
    """Return a pattern as a person writes it for --only: `weights` for `weights/*`."""
    name = pattern.removesuffix("/*")
    return pattern if any(character in name for character in "*?[/.") else name


def difference(path: Path, entry: FileEntry | FileDigest) -> str | None:
    """Return how a file differs from its entry, with both values; None if equal."""
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes, expected {entry.size}"
    sha256 = sha256_file(path)
    if sha256 != entry.sha256:
        return f"sha256 {sha256}, expected {entry.sha256}"
    return None


def check_host(
    manifest: Manifest, host: Mapping[str, str], *, toolchain: Mapping[str, str] | None = None, ranks: int | None = None
) -> None:  # fmt: skip
    """Reject an artifact for another host.

    `host` has the keys of the manifest's `requires`; a larger instruction set satisfies `isa`. `toolchain` and `ranks`
    are checked unless they are None.

    Raises:
        ArtifactError: every field that differs, with both values.

    """
    faults = [
        f"{field}: the artifact needs {value}, this host has {host.get(field, 'none')}"
        for field, value in manifest.requires.items()
        if not satisfies(field, value, host.get(field))
    ]
    if ranks is not None and ranks != manifest.ranks:
        faults.append(f"tensor: the artifact needs {manifest.ranks} ranks, found {ranks}")
    for field in ("backend", *LOADED_WITH):
        built, installed = manifest.toolchain.get(field), (toolchain or {}).get(field)
        if toolchain is not None and built is not None and _minor(built) != _minor(installed):
            faults.append(f"toolchain.{field}: the artifact needs {built}, this host has {installed or 'none'}")
    if faults:
        where = f"{manifest.name}@{manifest.version}"
        raise ArtifactError("; ".join(faults), where=where, fix="pull the variant for this host, or build here")


def check_replaceable(out: Path) -> None:
    """Reject an output path that is neither free nor an artifact.

    Raises:
        InputError: a mount point, a file, or a directory with other contents.

    """
    if os.path.ismount(out):
        what = "the directory is a mount point, which cannot be replaced in one step"
        raise InputError(what, where=str(out), fix=f"use a directory inside it, for example {out / 'artifact'}")
    if out.is_file():
        raise InputError("a file, not a directory; not replaced", where=str(out), fix="use a new directory")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError("not an artifact directory; not replaced", where=str(out), fix="use a new directory")


def _walk(root: Path) -> Iterator[Path]:
    """Yield every path below `root` except plain directories; links are not followed."""
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in [*names, *links])


def _odd_kind(path: Path) -> str | None:
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    return f"a link to {path.readlink()}" if stat.S_ISLNK(mode) else "not a plain file"


def differences(root: Path, listed: Mapping[str, FileEntry], progress: ByteProgress = no_byte_progress) -> list[str]:
    """Return the faults of the files; hash in threads, the largest first: hashlib releases the interpreter lock."""
    total, done, faults = sum(entry.size for entry in listed.values()), 0, []
    with ThreadPoolExecutor(HASHERS, "verify") as pool:
        order = sorted(listed, key=lambda name: -listed[name].size)
        names = {pool.submit(difference, root / name, listed[name]): name for name in order}
        for future in as_completed(names):
            name = names[future]
            if fault := future.result():
                faults.append(f"{name}: {fault}")
            done += listed[name].size
            progress(done, total)
    return faults


def satisfies(field: str, required: str, actual: str | None) -> bool:
    """Return whether a host's value satisfies a field of `requires`."""
    if field == "isa" and required in ISA_ORDER and actual in ISA_ORDER:
        return ISA_ORDER.index(actual) >= ISA_ORDER.index(required)
    return actual == required


def _minor(version: str | None) -> list[str] | None:
    return None if version is None else version.split("+")[0].split(".")[:2]
