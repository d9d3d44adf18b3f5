"""Compare an artifact's files with its manifest, and what it needs with a host. Opens nothing for execution.

Nothing outside the directory is opened, and links are refused. Signatures are not checked here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from pipeline.artifact.manifest import AGAIN, MANIFEST, SIGNATURE, Artifact, FileEntry, Manifest, read, select
from pipeline.errors import ArtifactError, InputError, no_string
from pipeline.files.atomic import FileDigest, sha256_file
from pipeline.progress import ByteProgress, no_byte_progress

HASHERS = 4
ISA_ORDER = ("default", "avx2", "avx512")
LOADED_WITH = ("torch", "cuda", "neuronx-cc", "neuronx-distributed")
"""Parts of a toolchain that loading needs too, in the same major.minor; the others only compiled."""


def verify(root: Path, progress: ByteProgress = no_byte_progress, *, only: Sequence[str] | None = None) -> Artifact:
    """Check every file's size and sha256, and that nothing is missing or extra; with `only`, of a part that was pulled.

    Raises:
        ArtifactError: every fault, naming each path and both values.

    """
    no_string(only, "only", "patterns")
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
    if ranks is not None and ranks != manifest.ranks:
        faults.append(f"tensor: the artifact needs {manifest.ranks} ranks, there are {ranks}")
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
