"""The local store of blobs that pulled artifacts are linked from: fetched in parallel parts, checked as they stream.

Parts arrive in any order and are written in order, so a partial file is always a beginning of its blob: a killed pull
is continued at its size, whatever byte that is. What waits in memory is bounded, whatever the blobs' sizes.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from filelock import FileLock

from pipeline.artifact.manifest import FileEntry
from pipeline.artifact.verify import difference
from pipeline.errors import ArtifactError, HostError
from pipeline.files.atomic import check_space, disk_errors
from pipeline.files.direct import BLOCK_BYTES, open_output
from pipeline.progress import ByteProgress
from pipeline.stores.base import Blob, Interrupted, Store

WRITERS = 6
READERS = 16
PART_BYTES = 8 << 20
AHEAD = 3
"""Parts of one blob on their way at a time. WRITERS * (AHEAD + 1) * PART_BYTES is all that a pull holds in memory."""
CHUNK_BYTES = 1 << 20
TRIES = 6
GIVE_UP_S = 90.0
"""No new try after this: some clients try again for a minute themselves."""
SHORT_TRIES = 3
"""Of answers that end early without an error: a blob that was cut in the registry does not grow."""
FIRST_PAUSE_S = 0.2


@dataclass
class _Meter:
    """Adds up bytes from several threads and reports them one at a time."""

    report: ByteProgress
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size_bytes: int) -> None:
        with self.lock:
            self.done += size_bytes
            self.report(self.done, self.total)


@dataclass(frozen=True)
class Origin:
    """Where blobs come from: a release of a store. `prefix` is the variant's folder in the release."""

    store: Store
    name: str
    version: str
    prefix: str = ""

    def blob(self, path: str, entry: FileEntry) -> Blob:
        """A file of the release."""
        return Blob(self.name, self.version, self.prefix + path, entry.sha256, entry.size)


@dataclass(frozen=True)
class _Job:
    """One blob on its way here."""

    origin: Origin
    path: str
    entry: FileEntry
    meter: _Meter
    readers: ThreadPoolExecutor
    stopped: threading.Event


class _Ring(threading.local):
    """Memory for the parts that a thread's blob has on their way, and for the one that it writes."""

    def __init__(self) -> None:
        self.parts = [memoryview(mmap.mmap(-1, PART_BYTES)) for _ in range(AHEAD + 1)]


RING = _Ring()


@dataclass(frozen=True)
class Blobs:
    """The local store, shared by processes."""

    root: Path

    def path(self, sha256: str) -> Path:
        """Where a blob lies."""
        return self.root / "sha256" / sha256[:2] / sha256

    def fetch_all(self, origin: Origin | None, files: Mapping[str, FileEntry], progress: ByteProgress) -> None:
        """Have every blob here, checked, several at a time. The first failure stops the others.

        Raises:
            ArtifactError: names the file and both digests.
            HostError: no space, or, without an origin, what is missing.

        """
        wanted = {entry.sha256: (path, entry) for path, entry in files.items()}
        absent = [(path, entry) for path, entry in wanted.values() if not self.path(entry.sha256).is_file()]
        if origin is None and absent:
            what = f"{len(absent)} files are not here, for example {min(absent)[0]}"
            raise HostError(what, where="offline", fix="pull this release once with a network")
        check_space(self.root, sum(entry.size - _size(self._partial(entry)) for _, entry in absent))
        meter = _Meter(progress, sum(entry.size for _, entry in wanted.values()))
        stopped = threading.Event()
        with ThreadPoolExecutor(READERS, "read") as readers, ThreadPoolExecutor(WRITERS, "pull") as writers:
            order = sorted(wanted.values(), key=lambda one: -one[1].size)  # large ones first: they end last
            running = [
                writers.submit(self._have, origin, path, entry, meter, readers, stopped) for path, entry in order
            ]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                stopped.set()
                writers.shutdown(wait=True, cancel_futures=True)
                raise

    def _have(
        self, origin: Origin | None, path: str, entry: FileEntry, meter: _Meter, readers: ThreadPoolExecutor,
        stopped: threading.Event,
    ) -> None:  # fmt: skip
        place = self.path(entry.sha256)
        with self._locked(entry):
            fault = difference(place, entry) if place.is_file() else "missing"
            if fault is None:
                meter.add(entry.size)
                with suppress(OSError):  # when it was used last, for `tandem cache gc`
                    os.utime(place)
            elif origin is None:
                raise HostError(f"{path} is damaged here: {fault}", where=str(place), fix="pull it online")
            else:
                self._fetch(_Job(origin, path, entry, meter, readers, stopped))

    @contextmanager
    def _locked(self, entry: FileEntry) -> Iterator[None]:
        place, lock = self.path(entry.sha256), self.root / "locks" / f"{entry.sha256}.lock"
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                yield

    def _fetch(self, job: _Job) -> None:
        """Continue where a killed pull stopped; if that does not match in the end, start over once."""
        entry, partial = job.entry, self._partial(job.entry)
        resumed = _size(partial) > 0
        found = _stream(job, partial)
        if found != entry.sha256 and resumed:
            job.meter.add(-min(_size(partial), entry.size))
            partial.unlink()
            found = _stream(job, partial)
        if found != entry.sha256:
            partial.unlink()
            what = f"{job.path}: sha256 {found}, should be {entry.sha256}"
            raise ArtifactError(what, where="registry", fix="publish the artifact again")
        partial.replace(self.path(entry.sha256))

    def _partial(self, entry: FileEntry) -> Path:
        """A fixed name, unlike a temp name, since the next pull continues it; the lock keeps it to one writer."""
        return self.path(entry.sha256).with_suffix(".partial")


def _stream(job: _Job, partial: Path) -> str:
    """Append what `partial` lacks; returns the sha256 of the whole. Never writes more than the blob's size."""
    digest, entry = hashlib.sha256(), job.entry
    with partial.open("a+b") as file:
        size = file.tell()
        if size < entry.size:
            file.truncate(size - size % BLOCK_BYTES)
        there = _digest_kept(file, digest)
        job.meter.add(min(there, entry.size))
        output = open_output(file, BLOCK_BYTES, aligned=True)
        for piece in _parts(job, there):
            digest.update(piece)
            output.write(piece)
            job.meter.add(len(piece))
        output.finish()
    return digest.hexdigest()


def _digest_kept(file: IO[bytes], digest: hashlib._Hash) -> int:
    file.seek(0)
    while piece := file.read(CHUNK_BYTES):
        digest.update(piece)
    return file.tell()


def _parts(job: _Job, offset: int) -> Iterator[memoryview]:
    """The blob's parts from `offset` on, in order, some read ahead, each in memory that a later one takes over."""
    starts = iter(range(offset, job.entry.size, PART_BYTES))
    memory, ahead = itertools.cycle(RING.parts), deque[Future[memoryview]]()

    def read_ahead() -> None:
        start = next(starts, None)
        if start is not None:
            buffer = next(memory)[: job.entry.size - start]
            ahead.append(job.readers.submit(_read, job, start, buffer))

    for _ in range(AHEAD):
        read_ahead()
    try:
        while ahead:
            piece = ahead.popleft().result()
            read_ahead()
            yield piece
    finally:
        for future in ahead:
            future.cancel()
        wait(ahead)  # one that runs would write into the memory of this thread's next blob


def _read(job: _Job, offset: int, buffer: memoryview) -> memoryview:
    """One part, tried again after failures that may pass, with growing pauses; a short answer is one of them."""
    pause, short, blob = FIRST_PAUSE_S, 0, job.origin.blob(job.path, job.entry)
    started = time.monotonic()
    for attempt in range(TRIES):
        if job.stopped.is_set():
            raise Interrupted("another file failed", where=job.path)
        try:
            found = job.origin.store.read_blob(blob, offset, buffer)
        except Interrupted:
            if attempt == TRIES - 1 or time.monotonic() - started > GIVE_UP_S:
                raise
        else:
            if found == len(buffer):
                return buffer
            short += 1
            if short == SHORT_TRIES:
                break
        job.stopped.wait(pause * (1 + random.random()))  # noqa: S311 - spreads the load
        pause *= 2
    what = f"{job.path}: the registry sends fewer bytes than its {job.entry.size}"
    raise ArtifactError(what, where=blob.sha256, fix="publish the artifact again")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
