"""The one way files are written: temp in the same folder, fsync, rename; digests; path safety. Imports no torch.

A kill at any moment leaves the old file or the new one. Temp names carry host and process, so that what a killed writer
left is swept by the next one. Waiting for other writers is not done here: see `Cache.lock`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.errors import ArtifactError, HostError

TEMP = ".tmp-"
FOREIGN_AGE_S = 24 * 3600.0
"""Temp names of another host, whose processes cannot be seen from here, are swept after a day."""

SYNCS = 8
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)

WRITABLE = "choose a folder that can be written"
FIXES = {
    errno.ENOSPC: "free space on this disk, or choose another one",
    errno.EDQUOT: "free space in this quota, or choose another disk",
    errno.EFBIG: "choose a disk that takes large files, or raise the limit (ulimit -f)",
    errno.EROFS: WRITABLE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.ENOTDIR: "a file is in the way of this folder; move it",
    errno.EEXIST: "a file is in the way of this folder; move it",
    errno.EISDIR: "a folder is in the way of this file; move it",
}


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
        if error.errno not in FIXES:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        left = f"; {free_bytes(path):,} bytes are free" if full else ""
        # A file opened while this one is written may be the one at fault.
        where = str(path if error.filename is None or TEMP in str(error.filename) else error.filename)
        raise HostError(f"cannot write: {error.strerror}{left}", where=where, fix=FIXES[error.errno]) from error


def free_bytes(path: Path) -> int:
    """Bytes free on the disk of `path`, which need not exist yet."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse work that cannot fit, before it starts.

    Raises:
        HostError: names bytes needed and free.

    """
    free = free_bytes(path)
    if free < needed_bytes:
        what = f"no space: {needed_bytes:,} bytes needed, {free:,} free"
        raise HostError(what, where=str(path), fix=FIXES[errno.ENOSPC])


def check_writable(folder: Path) -> None:
    """Refuse work whose result could not be written, before it starts; makes the folder.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(folder), _temp_file(folder / "check"):
        pass


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` complete, or not at all.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(path), _temp_file(path) as (temp, file):
        yield file
        _finish(file)
        temp.replace(path)
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file whole."""
    with atomic_file(path) as file:
        file.write(data)


def create_only(path: Path, data: bytes) -> bool:
    """Write a file that must not be there yet; of several writers one gets True, and nobody sees half a file.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    with disk_errors(path), _temp_file(path) as (temp, file):
        file.write(data)
        _finish(file)
        try:
            if not _rename(temp, path, RENAME_NOREPLACE):
                os.link(temp, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True


@contextlib.contextmanager
def atomic_dir(path: Path, *, replace: bool = True, aside: Path | None = None) -> Iterator[Path]:
    """Build a folder aside; at the end it takes the place of `path`, exchanged in one step if one is there already.

    Without `replace` nothing may be there. `aside` is where it is built: a folder on the same disk, for readers that
    take every name beside `path` for their own.

    Raises:
        HostError: no space, read-only or forbidden.
        ArtifactError: something came to be at `path`, and may not be replaced.

    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_once(aside or path.parent)
        temp = temp_name((aside or path.parent) / path.name)
        temp.mkdir()
        try:
            yield temp
            _sync_tree(temp)
            (_take_place if replace else _take_free_place)(temp, path)
            sync_folder(path.parent)
        finally:
            remove(temp)  # what did not come to be, or what was replaced


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: temp names whose process is gone."""
    for left in folder.glob(f"{TEMP}*"):
        with contextlib.suppress(OSError):  # others sweep, too
            if _abandoned(left):
                remove(left)


@functools.cache
def sweep_once(folder: Path) -> None:
    """Sweep a folder the first time that this process writes there."""
    sweep(folder)


def sha256_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> FileDigest:
    """sha256 and size of a file."""
    return FileDigest(sha256_file(path), path.stat().st_size)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link the file that `source` leads to, or copy it where the disk does not allow links."""
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
    except FileNotFoundError:  # seldom: of many files of a folder, the first
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)


def safe_relative(path: str, where: str) -> PurePosixPath:
    """A path of a manifest, known to stay inside its folder as long as no link is in it.

    Raises:
        ArtifactError: absolute, empty, with `..`, a backslash or a control character.

    """
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and not path.startswith("/") and parts and ".." not in parts
    odd = any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or c == "\\" for c in path)  # and what no file system encodes
    if not plain or odd:
        what = f"path {path!r} leaves its folder or is not plain"
        raise ArtifactError(what, where=where, fix="do not use this artifact")
    return PurePosixPath(path)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    _sync(folder)


@contextlib.contextmanager
def _temp_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_once(path.parent)
    temp = temp_name(path)
    try:
        with temp.open("xb") as file:
            yield temp, file
    finally:
        temp.unlink(missing_ok=True)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    """Several at a time: a disk takes them together."""
    files, folders = [], [root]
    for folder in folders:  # grows on the way
        with os.scandir(folder) as entries:
            for one in entries:
                if one.is_dir(follow_symlinks=False):
                    folders.append(Path(one.path))
                elif one.is_file(follow_symlinks=False):
                    files.append(Path(one.path))
    with ThreadPoolExecutor(SYNCS, "sync") as pool:
        for paths in (files, folders):
            for _ in pool.map(_sync, paths):
                pass


def _take_place(temp: Path, path: Path) -> None:
    """Rename onto `path`, whatever is there, even if it comes or goes meanwhile."""
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
        old = temp_name(path)  # a disk without exchange: a kill between the two renames leaves no folder, not half
        path.rename(old)
        temp.rename(path)
        remove(old)
        return


def _take_free_place(temp: Path, path: Path) -> None:
    try:
        if not _rename(temp, path, RENAME_NOREPLACE):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            temp.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        what = "something came to be here meanwhile, and is not replaced"
        raise ArtifactError(what, where=str(path), fix="run the same command again") from error


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Linux's renameat2; False where this system or disk does not know it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


def temp_name(path: Path) -> Path:
    """A name beside `path` that `sweep` removes once this process is gone."""
    # The name is cut, since the whole must stay under 255 bytes.
    return path.parent / f"{TEMP}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name[:60]}"


def _abandoned(temp: Path) -> bool:
    host, _, rest = temp.name.removeprefix(TEMP).partition("-")
    pid = rest.partition("-")[0]
    if host == _host() and pid.isdigit():
        return not _running(int(pid))
    return time.time() - temp.lstat().st_mtime > FOREIGN_AGE_S


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _host() -> str:
    """Names this host, or this container: process numbers mean nothing elsewhere."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
