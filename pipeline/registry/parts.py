"""Parts of a blob of a registry, in order and some read ahead, and a blob as a file that another store can send.

Transient failures are retried. Digests are compared by whoever writes the bytes. Writes no file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

from pipeline.errors import CorruptError
from pipeline.files.limits import DO_NOT_USE
from pipeline.stores.base import SMALL_BYTES, Blob, Interrupted, Pinned, Store

if TYPE_CHECKING:  # a type of annotations only
    from _typeshed import WriteableBuffer

TRIES = 6
GIVE_UP_S = 90.0
"""No new attempt after this: some clients retry for a minute themselves."""
SHORT_TRIES = 3
"""Attempts after responses that end early without an error: a blob that was truncated in the registry does not grow."""
FIRST_PAUSE_S = 0.2
SENT_PART_BYTES = 4 << 20
SENT_AHEAD = 2
"""Size of the parts of a blob that is sent on, and their number ahead. A store sends several blobs at a time."""


@dataclass(frozen=True)
class Origin:
    """Where blobs come from: a release of a store. `prefix` is the variant's folder in the release.

    `where` names the release, and `fix` the remedy, in errors of damaged bytes.
    """

    store: Store
    name: str
    version: str
    prefix: str = ""
    where: str = "registry"
    fix: str = "publish the artifact again"

    def blob(self, path: str, entry: Pinned) -> Blob:
        """Return a file of the release as a blob."""
        return Blob(self.name, self.version, self.prefix + path, entry.sha256, entry.size)


@dataclass(frozen=True)
class Reading:
    """One blob that is read in parts by threads, which give up when `stopped` is set."""

    origin: Origin
    path: str
    entry: Pinned
    readers: ThreadPoolExecutor
    stopped: threading.Event


def parts(of: Reading, offset: int, memory: Sequence[memoryview], *, shared: bool) -> Generator[memoryview]:
    """Yield the blob's parts from `offset` on, in order, as many read ahead as `memory` has buffers but one.

    A part is valid until the next one is taken: later parts reuse its buffer. With `shared` memory, which others use
    afterwards, the generator ends when no read runs any more.
    """
    starts = iter(range(offset, of.entry.size, len(memory[0])))
    buffers, ahead = itertools.cycle(memory), deque[Future[memoryview]]()

    def read_ahead() -> None:
        start = next(starts, None)
        if start is not None:
            buffer = next(buffers)[: of.entry.size - start]
            ahead.append(of.readers.submit(_read, of, start, buffer))

    for _ in range(len(memory) - 1):
        read_ahead()
    try:
        while ahead:
            piece = ahead.popleft().result()
            read_ahead()
            yield piece
    finally:
        for future in ahead:
            future.cancel()
        if shared:  # else no wait: this may run in the garbage collector, while any lock is held
            wait(ahead)


def read_whole(origin: Origin, path: str, entry: Pinned) -> bytes:
    """Return a small file of a release, after its digest was checked.

    Raises:
        CorruptError: another digest than the release lists, or a size over the limit for manifests.

    """
    where = f"{origin.where}: {path}"
    if entry.size > SMALL_BYTES:
        what = f"manifest too large: {entry.size:,} bytes, limit {SMALL_BYTES:,}"
        raise CorruptError(what, where=where, fix=DO_NOT_USE)
    buffer = memoryview(bytearray(entry.size))
    data = bytes(buffer[: origin.store.read_blob(origin.blob(path, entry), 0, buffer)])
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != entry.sha256:
        what = f"sha256 mismatch: expected {entry.sha256}, found {sha256}"
        raise CorruptError(what, where=where, fix=origin.fix)
    return data


def _read(of: Reading, offset: int, buffer: memoryview) -> memoryview:
    """Return one part; transient failures and short responses are retried with growing pauses."""
    pause, short, blob = FIRST_PAUSE_S, 0, of.origin.blob(of.path, of.entry)
    started = time.monotonic()
    for attempt in range(TRIES):
        if of.stopped.is_set():
            raise Interrupted("another file failed", where=of.path)
        try:
            count = of.origin.store.read_blob(blob, offset, buffer)
        except Interrupted:
            if attempt == TRIES - 1 or time.monotonic() - started > GIVE_UP_S:
                raise
        else:
            if count == len(buffer):
                return buffer
            short += 1
            if short == SHORT_TRIES:
                break
        of.stopped.wait(pause * (1 + random.random()))  # noqa: S311 - spreads the load
        pause *= 2
    what = f"{of.path}: truncated in the registry: fewer bytes than the expected {of.entry.size}"
    raise CorruptError(what, where=blob.sha256, fix=of.origin.fix)


@dataclass(frozen=True)
class BlobSource:
    """A blob of a registry as the source of a file that another store sends; see `Remote`."""

    reading: Reading

    def __str__(self) -> str:
        return f"{self.reading.origin.where}: {self.reading.path}"

    @property
    def fix(self) -> str:
        """Remedy for damaged bytes."""
        return self.reading.origin.fix

    def open(self, mode: Literal["rb"]) -> IO[bytes]:  # noqa: ARG002 - as a path is opened
        """Return the blob as a file that is read once, from its start."""
        return io.BufferedReader(_PartsFile(self.reading))


class _PartsFile(io.RawIOBase):
    """The parts of a blob as a file. The memory is its own: stores read from threads that they choose."""

    def __init__(self, of: Reading) -> None:
        size = max(1, min(SENT_PART_BYTES, of.entry.size))
        memory = [memoryview(bytearray(size)) for _ in range(SENT_AHEAD + 1)]
        self._parts, self._left = parts(of, 0, memory, shared=False), memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer, at most to the end of a part; returns the number of bytes, 0 at the blob's end."""
        if not self._left:
            self._left = next(self._parts, self._left)
        view = memoryview(buffer)
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        """Stop the reads that are ahead."""
        self._parts.close()
        super().close()
