"""Atomic writes: temporary file in the same folder, fsync, rename; also digests and path safety. Imports no torch.

A kill at any moment leaves the old file or the new one; the next writer removes the temporary files of a killed one:
see `unfinished.py`. Does not wait for other writers: see `Cache.lock`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.errors import ArtifactError, CorruptError, HostError
from pipeline.files.durable import make_folder, sync
from pipeline.files.unfinished import TEMP, remove, sweep_once, temp_file, temp_folder, temp_name

SYNCS = 8
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)

WRITABLE = "use a folder with write permission"
FIXES = {
    errno.ENOSPC: "free space on this disk, or use another disk",
    errno.EDQUOT: "free space in this quota, or use another disk",
    errno.EFBIG: "use a disk for large files, or raise the limit (ulimit -f)",
    errno.EROFS: WRITABLE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.ENOTDIR: "a file has the name of this folder; move the file",
    errno.EEXIST: "a file has the name of this folder; move the file",
    errno.EISDIR: "a folder has the name of this file; move the folder",
}


@dataclass(frozen=True)
class FileDigest:
    """The digest and size that pin a file's contents."""

    sha256: str
    size: int


MAX_PATH, MAX_DEPTH = 512, 32
"""Characters of a path in a manifest, and its names between slashes."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of full, read-only and forbidden disks into a `HostError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in FIXES:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        left = f"; {free_bytes(path):,} bytes are free" if full else ""
        # A file opened while this one is written may be the one at fault.
        where = str(path if error.filename is None or TEMP in str(error.filename) else error.filename)
        raise HostError(f"cannot write: {error.strerror}{left}", where=where, fix=FIXES[error.errno]) from error


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_space(path: Path, needed_bytes: int) -> None:
    """Reject work that does not fit on the disk, before it starts.

    Raises:
        HostError: too little space; names bytes needed and free.

    """
    free = free_bytes(path)
    if free < needed_bytes:
        what = f"no space: {needed_bytes:,} bytes needed, {free:,} free"
        raise HostError(what, where=str(path), fix=FIXES[errno.ENOSPC])


def check_writable(folder: Path) -> None:
    """Reject work whose result could not be written, before it starts; creates the folder.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(folder), temp_file(folder / "check"):
        pass


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` complete or not at all.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(path), temp_file(path) as (temp, file):
        yield file
        _finish(file)
        temp.replace(path)
        sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def create_only(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet; of several writers exactly one gets True. Readers never see a partial file.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(path), temp_file(path) as (temp, file):
        file.write(data)
        _finish(file)
        try:
            if not _rename(temp, path, RENAME_NOREPLACE):
                os.link(temp, path)
        except FileExistsError:
            return False
        sync(path.parent)
        return True


@contextlib.contextmanager
def atomic_dir(path: Path, *, replace: bool = True, aside: Path | None = None) -> Iterator[Path]:
    """Build a folder under a temporary name, then move it to `path`, in one step even if `path` exists already.

    Without `replace`, `path` must not exist. `aside` is the folder for the temporary name, on the same disk: for
    readers that interpret every name beside `path`.

    Raises:
        HostError: no space, read-only or forbidden.
        ArtifactError: `path` was created by another process, and `replace` is False.

    """
    with disk_errors(path):
        make_folder(path.parent)
        sweep_once(aside or path.parent)
        with temp_folder((aside or path.parent) / path.name) as temp:
            yield temp
            _sync_tree(temp)
            (_move_over if replace else _move_to_free)(temp, path)
            sync(path.parent)


@contextlib.contextmanager
def resumable_dir(path: Path) -> Iterator[Path]:
    """Build a folder that a killed process leaves beside `path` and the next call continues; then move it to `path`.

    One process at a time: hold a lock. Interrupts and a `HostError` keep the folder, other errors remove it.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    partial = path.with_suffix(".partial")
    with disk_errors(path):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        except Exception as error:
            if not isinstance(error, HostError | OSError):
                remove(partial)
            raise
        _sync_tree(partial)
        _move_over(partial, path)
        sync(path.parent)


def sha256_file(path: Path) -> str:
    """Return the digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Return the sha256 and size of a file."""
    return FileDigest(sha256_file(path), path.stat().st_size)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link the file that `source` resolves to, or copy it where the disk does not allow links."""
    real = source.resolve() if source.is_symlink() else source
    try:
        _link(real, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with real.open("rb") as file, atomic_file(target) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:  # rare: only the first of the files of a folder
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)


def safe_relative(path: str, where: str) -> PurePosixPath:
    """Return a path of a manifest, which stays inside its folder as long as the folder has no links.

    Raises:
        CorruptError: the path is absolute, empty, too long or too deep, or has `..`, a backslash or a control
            character.

    """
    if len(path) > MAX_PATH or path.count("/") >= MAX_DEPTH:  # before work that grows with the depth
        what = f"path of {len(path)} characters in {path.count('/')} folders: {path[:80]!r}"
        fix = f"use paths of at most {MAX_PATH} characters in {MAX_DEPTH - 1} folders"
        raise CorruptError(what, where=where, fix=fix)
    parts = PurePosixPath(path).parts
    relative = path == "/".join(parts) and not path.startswith("/") and parts and ".." not in parts
    unsafe = any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or c == "\\" for c in path)  # surrogates cannot be encoded
    if not relative or unsafe:
        what = f"unsafe path: {path!r}"
        raise CorruptError(what, where=where, fix="do not use this artifact")
    return PurePosixPath(path)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_tree(root: Path) -> None:
    """Sync several files at a time: a disk combines the requests."""
    files, folders = [], [root]
    for folder in folders:  # grows in the loop
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    files.append(Path(entry.path))
    with ThreadPoolExecutor(SYNCS, "sync") as pool:
        for paths in (files, folders):
            for _ in pool.map(sync, paths):
                pass


def _move_over(temp: Path, path: Path) -> None:
    """Rename onto `path`, whether it exists or not, even if another process creates or removes it."""
    while True:
        try:
            if not os.path.lexists(path):
                temp.rename(path)
                return
            if _rename(temp, path, RENAME_EXCHANGE):
                return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not temp.exists():
                raise
            continue
        # A disk without exchange: a kill between the two renames leaves no folder, never a partial one.
        old = temp_name(path)
        path.rename(old)
        temp.rename(path)
        remove(old)
        return


def _move_to_free(temp: Path, path: Path) -> None:
    try:
        if not _rename(temp, path, RENAME_NOREPLACE):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            temp.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        what = "destination was created by another process; not overwritten"
        raise ArtifactError(what, where=str(path), fix="run the same command again") from error


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Call Linux's renameat2; returns False where the system or disk does not support it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))
