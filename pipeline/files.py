"""The one way files are written: temp in the same folder, fsync, rename. Plus digests and path safety. Imports no torch.

A kill at any moment leaves either the old file or the new one; temp names of dead writers are swept by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.errors import ArtifactError, HostError

TEMP = ".tmp-"
CHUNK_BYTES = 1 << 20
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@dataclass(frozen=True)
class FileDigest:
    """What pins a file's contents."""

    sha256: str
    size: int


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn full, read-only and forbidden disks into a `HostError` that names the place."""
    try:
        yield
    except OSError as error:
        fixes = {
            errno.ENOSPC: "free space on this disk, or set TANDEM_CACHE and --out to another one",
            errno.EDQUOT: "free space in this quota",
            errno.EROFS: "choose a folder that can be written",
            errno.EACCES: "choose a folder that can be written",
            errno.EPERM: "choose a folder that can be written",
            errno.ENOTDIR: "a file is in the way of this folder; move it",
        }
        if error.errno not in fixes:
            raise
        raise HostError(f"cannot write: {error.strerror}", where=str(path), fix=fixes[error.errno]) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` complete, or not at all.

    Raises:
        HostError: no space, read-only or forbidden.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = _temp_name(path)
        try:
            with temp.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
            sync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file whole."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Build a folder aside; at the end it takes the place of `path`, exchanged in one step if one is there already.

    Raises:
        HostError: no space, read-only or forbidden.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temp = _temp_name(path)
        temp.mkdir()
        try:
            yield temp
            _sync_tree(temp)
            _take_place(temp, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: temp names whose process is gone."""
    for left in folder.glob(f"{TEMP}*"):
        owner = left.name.removeprefix(TEMP).split("-", 1)[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> FileDigest:
    """sha256 and size of a file."""
    return FileDigest(sha256_file(path), path.stat().st_size)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, or copy where the disk does not allow it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def safe_relative(path: str, where: str) -> PurePosixPath:
    """A path of a manifest, known to stay inside its folder.

    Raises:
        ArtifactError: absolute, empty, with `..`, a backslash or a control character.
    """
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and not path.startswith("/") and parts and ".." not in parts
    if not plain or "\\" in path or any(ord(c) < 32 for c in path):
        raise ArtifactError(f"path {path!r} leaves its folder or is not plain", where=where, fix="do not use this artifact")
    return PurePosixPath(path)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(folder))


def _take_place(temp: Path, path: Path) -> None:
    if not path.exists():
        temp.rename(path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, bytes(temp), AT_FDCWD, bytes(path), RENAME_EXCHANGE) == 0:
        return
    old = _temp_name(path)  # a file system without exchange: a kill between the two renames leaves no artifact, not half
    path.rename(old)
    temp.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _temp_name(path: Path) -> Path:
    return path.parent / f"{TEMP}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
