"""Choose the folder for temporary files of compilers, loaders of libraries, and sockets. Runs nothing.

Inductor splits its command lines at spaces, libraries cannot be loaded from a file system mounted `noexec`, and sockets
have short names. The choice depends on the environment and on mounts alone: libraries contain paths in the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

from pipeline.errors import HostError, Problem
from pipeline.files.unfinished import work_folder

VARIABLES = ("TMPDIR", "TEMP", "TMP")
"""As Python's `tempfile` reads them, in this order."""

FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108 - candidates; our folder in them belongs to this user alone
NEEDED_BYTES = 128 << 20
"""Precompiled headers and sources of one graph."""

LONGEST_PATH = 70
"""A socket's path has at most 107 characters, and multiprocessing adds 32 of its own."""

AFTER_SOCKETS = -200
"""Multiprocessing removes its own folder at -100."""
SWEPT_NAME = 40
"""Most characters of the name of a folder that is swept."""

SAFE = re.compile(r"[\w./+,@%=:-]*", re.ASCII)
"""Paths that need no quotes in a command line."""


def temporary_folder() -> Path:
    """Return the first usable folder of the environment's, the system's, and this user's cache.

    Raises:
        HostError: none is usable; names each folder and its fault.

    """
    candidates = _candidates()
    for path in candidates:
        if not fault(path):
            return path
    faults = ", ".join(f"`{path}` ({fault(path)})" for path in candidates)
    what = f"no folder is usable for compiled files: {faults}"
    fix = "set TMPDIR to a writable folder with a short path without spaces, not mounted noexec"
    raise HostError(what, where="TMPDIR", fix=fix)


def problems() -> list[Problem]:
    """Return what prevents a compilation: no usable folder, or a full disk."""
    try:
        path = temporary_folder()
    except HostError as error:
        return list(error.problems)
    free = shutil.disk_usage(path).free
    if free >= NEEDED_BYTES:
        return []
    what = f"{free >> 20} MiB free in `{path}`; the compiler needs about {NEEDED_BYTES >> 20} MiB"
    return [Problem("TMPDIR", what, "free disk space, or set TMPDIR to a folder on another disk")]


def fault(path: Path) -> str:
    """Return why a folder is unusable; empty if it is usable."""
    if not path.is_absolute() or SAFE.fullmatch(str(path)) is None:
        return "its path has spaces or other special characters" if path.is_absolute() else "not an absolute path"
    if len(str(path)) > LONGEST_PATH:
        return f"its path has more than {LONGEST_PATH} characters"
    if not path.is_dir():
        return "not a folder" if path.exists() else "missing"
    if not os.access(path, os.W_OK | os.X_OK):
        return "not writable"
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        return "mounted noexec"
    return _fault_of_own(own_folder(path))


def _fault_of_own(own: Path) -> str:
    """Return why this user's folder cannot be trusted: others may have written what compilers and loaders read."""
    try:
        facts = own.lstat()
    except FileNotFoundError:
        return ""
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        return f"{own.name} in it belongs to another user, or is a link"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {own.name} in it: remove it"
    return ""


def own_folder(path: Path) -> Path:
    """Return this user's folder in a folder for temporary files."""
    return path / f"tandem-inductor-{os.getuid()}"


def prepared_folder(path: Path) -> Path:
    """Create this user's folder in a folder for temporary files, closed to others, and return it."""
    own = own_folder(path)
    own.mkdir(mode=0o700, exist_ok=True)
    return own


@contextmanager
def temporary_files(path: Path) -> Iterator[None]:
    """Let this process, its libraries and its children write temporary files in `path`."""
    variable, setting = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(path)
    try:
        yield
    finally:
        tempfile.tempdir = setting
        os.environ.pop("TMPDIR")
        if variable is not None:
            os.environ["TMPDIR"] = variable


def start_server() -> None:
    """Start multiprocessing's forkserver, in another folder if TMPDIR is too long for the path of its socket.

    The server and its workers do not get Ctrl-C, which this process handles for them: while the server imports the
    modules that workers share, it would end in a traceback.

    Raises:
        HostError: as `temporary_folder`.

    """
    with temporary_files(_server_folder()):
        resource_tracker.ensure_running()  # its start, which the server's would include, unblocks Ctrl-C
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children inherit it
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _server_folder() -> Path:
    """Return the folder of multiprocessing's sockets: one that the next process sweeps, where a path is short enough.

    Python names its own `pymp-*`, which nothing sweeps after a kill.
    """
    named = Path(tempfile.gettempdir())
    short = (path for path in (named, *_candidates()) if len(str(path)) <= LONGEST_PATH - SWEPT_NAME)
    folder = next((path for path in short if not fault(path)), None)
    if folder is None:  # a folder that nothing sweeps
        return named if len(str(named)) <= LONGEST_PATH else temporary_folder()
    kept = ExitStack()
    util.Finalize(None, kept.close, exitpriority=AFTER_SOCKETS)
    return kept.enter_context(work_folder("sockets", folder))


def _candidates() -> list[Path]:
    named = [Path(value) for name in VARIABLES if (value := os.environ.get(name))]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - needs no home
    return list(dict.fromkeys([*named, *map(Path, FOLDERS), Path(cache)]))
