"""Large files written in order: past the page cache where the disk supports it, which saves a copy and memory.

Independent of the contents. Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
from typing import IO, Protocol

FLUSH_BYTES = 64 << 20
BLOCK_BYTES = 4096
"""Alignment of direct writes: no disk has larger blocks."""


class Output(Protocol):
    """A file that is appended to."""

    def write(self, data: bytes | memoryview) -> None:
        """Append data; the caller may change `data` afterwards."""
        ...

    def finish(self) -> None:
        """Write the buffered bytes. The file is complete afterwards, but not synced."""
        ...


def open_output(file: IO[bytes], *, direct: bool = True) -> Output:
    """Return an output that appends to a file whose size is whole blocks.

    Data must start at page boundaries of memory, and be whole blocks except for the last piece: a disk takes only that
    without the page cache.
    """
    if direct and _set_direct(file, on=True):
        return _Direct(file)
    return _Cached(file)


class _Cached:
    """A file written through the page cache, and sent to the disk along the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sent = file, file.tell()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        end = self._file.tell()
        if end - self._sent >= FLUSH_BYTES:
            # This does not drop pages that are not on disk yet: it starts writing them, so that the final fsync has
            # little left to do.
            os.posix_fadvise(self._file.fileno(), self._sent, end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = end

    def finish(self) -> None:
        self._file.flush()


class _Direct:
    """A file written past the page cache: one copy less, and other data stays in memory.

    The bytes after the last whole block go through the cache.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._rest = file, b""

    def write(self, data: bytes | memoryview) -> None:
        assert not self._rest
        view = memoryview(data)
        whole = len(view) - len(view) % BLOCK_BYTES
        self._flush(view[:whole])
        self._rest = bytes(view[whole:])

    def finish(self) -> None:
        _set_direct(self._file, on=False)
        self._flush(memoryview(self._rest))

    def _flush(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._file.fileno(), view) :]


def _set_direct(file: IO[bytes], *, on: bool) -> bool:
    """Switch direct writing on or off; returns False where the file system does not support it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True
