"""Temporary files and folders beside their destination: named, locked while their writer lives, swept when it is gone.

A name carries host and process, so that the next writer removes the files of a killed one. The name alone is no proof:
two containers that share a disk may have one host name, and each sees the other's processes as dead. A writer therefore
holds a lock (flock) on what it writes, and what is locked is never removed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.files.durable import make_folder

TEMP = ".tmp-"
FOREIGN_AGE_S = 24 * 3600.0
"""Age at which temporary files of another host, whose processes are not visible here, are removed."""


@contextlib.contextmanager
def temp_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Create a file beside `path`, locked; removes it in the end unless it was renamed."""
    make_folder(path.parent)
    sweep_once(path.parent)
    while True:
        temp = temp_name(path)
        try:
            with temp.open("xb") as file:
                if _hold(file.fileno(), temp):
                    yield temp, file
                    return
        finally:
            if _is_ours(temp):
                temp.unlink(missing_ok=True)


@contextlib.contextmanager
def work_folder(what: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a folder for temporary files, closed to others, and remove it in the end; `parent` by default TMPDIR.

    A killed process leaves its folder, which the next one removes: nothing else sweeps TMPDIR.
    """
    parent = parent or Path(tempfile.gettempdir())
    sweep_once(parent)
    with temp_folder(parent / what, 0o700) as folder:
        yield folder


@contextlib.contextmanager
def temp_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Create a folder beside `path`, locked; removes it in the end, or the folder that it was exchanged with."""
    while True:
        temp = temp_name(path)
        temp.mkdir(mode)
        handle = os.open(temp, os.O_RDONLY)
        try:
            if _hold(handle, temp):
                yield temp
                return
        finally:
            if _is_ours(temp):
                remove(temp)
            os.close(handle)


def _is_ours(temp: Path) -> bool:
    """Return whether this process gave the name: a fork of it, which ends or collects garbage, removes nothing."""
    return _writer(temp) == (_host(), str(os.getpid()))


def _writer(temp: Path) -> tuple[str, str]:
    """Return host and process in a temporary name; what is not one gives other words."""
    host, _, rest = temp.name.removeprefix(TEMP).partition("-")
    return host, rest.partition("-")[0]


def _hold(handle: int, temp: Path) -> bool:
    """Lock a new temporary file or folder until it is closed; returns False if a sweep has removed it before."""
    with contextlib.suppress(OSError):  # a disk without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(handle), temp.lstat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(temp: Path) -> Iterator[bool]:
    """Lock a temporary file or folder during the block; yields whether its writer is gone."""
    handle = os.open(temp, (os.O_RDONLY if temp.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        except OSError:  # a disk without locks
            is_free = _is_old(temp)
        yield is_free
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers in `folder`."""
    for temp in folder.glob(f"{TEMP}*"):
        with contextlib.suppress(OSError):  # other processes sweep, too
            if _abandoned(temp):
                with _locked(temp) as is_free:
                    if is_free:
                        remove(temp)


@functools.cache
def sweep_once(folder: Path) -> None:
    """Sweep a folder before the first write of this process to it."""
    sweep(folder)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temp_name(path: Path) -> Path:
    """Return a name beside `path` that `sweep` removes once this process has ended."""
    # The name is truncated, since the whole must stay under 255 bytes.
    return path.parent / f"{TEMP}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name[:60]}"


def _abandoned(temp: Path) -> bool:
    """Return whether a temporary name may be that of a killed writer, by its host, process and age."""
    host, pid = _writer(temp)
    if host == _host() and pid.isdigit():
        return not _running(int(pid))
    return _is_old(temp)


def _is_old(temp: Path) -> bool:
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
    """Return an id of this host or container, in which process numbers are valid."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
