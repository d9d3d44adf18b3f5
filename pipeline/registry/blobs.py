"""The local store of blobs that pulled artifacts are linked from: fetched in parallel parts, checked as they stream.

Parts arrive in any order and are written in order, so a partial file is always a prefix of its blob: a killed pull
continues at the file's size. Memory is bounded independently of the blobs' sizes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from filelock import FileLock

from pipeline.artifact.manifest import FileEntry
from pipeline.artifact.verify import difference
from pipeline.errors import CorruptError, HostError
from pipeline.files.atomic import check_space, disk_errors
from pipeline.files.direct import BLOCK_BYTES, open_output
from pipeline.progress import ByteProgress
from pipeline.registry.parts import Origin, Reading, parts

WRITERS = 6
READERS = 16
PART_BYTES = 8 << 20
AHEAD = 3
"""Parts of a blob that are read ahead. A pull holds WRITERS * (AHEAD + 1) * PART_BYTES in memory."""
CHUNK_BYTES = 1 << 20


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
class _Job:
    """The fetch of one blob; without an origin, the blob must be in the local store."""

    origin: Origin | None
    path: str
    entry: FileEntry
    meter: _Meter
    readers: ThreadPoolExecutor
    stopped: threading.Event


class _Ring(threading.local):
    """A thread's memory for the parts that are read ahead, and for the part that is being written."""

    def __init__(self) -> None:
        self.parts = [memoryview(mmap.mmap(-1, PART_BYTES)) for _ in range(AHEAD + 1)]


RING = _Ring()


@dataclass(frozen=True)
class Blobs:
    """The local store, shared by processes."""

    root: Path

    def path(self, sha256: str) -> Path:
        """Return the path of a blob."""
        return self.root / "sha256" / sha256[:2] / sha256

    def fetch_all(self, origin: Origin | None, files: Mapping[str, FileEntry], progress: ByteProgress) -> None:
        """Store every blob locally, checked, several at a time; the first failure stops the others.

        Raises:
            CorruptError: a digest mismatch; names the file and both digests.
            HostError: no space, or, without an origin, a missing blob.

        """
        named = {entry.sha256: (path, entry) for path, entry in files.items()}
        absent = [(path, entry) for path, entry in named.values() if not self.path(entry.sha256).is_file()]
        if origin is None and absent:
            what = f"{len(absent)} files are not in the local cache, for example {min(absent)[0]}"
            raise HostError(what, where="offline", fix="pull this release once without --offline")
        check_space(self.root, sum(entry.size - _size(self._partial(entry)) for _, entry in absent))
        meter = _Meter(progress, sum(entry.size for _, entry in named.values()))
        stopped = threading.Event()
        with ThreadPoolExecutor(READERS, "read") as readers, ThreadPoolExecutor(WRITERS, "pull") as writers:
            jobs = [_Job(origin, path, entry, meter, readers, stopped) for path, entry in named.values()]
            jobs.sort(key=lambda job: -job.entry.size)  # large blobs first: they end last
            try:
                for future in as_completed([writers.submit(self._store, job) for job in jobs]):
                    future.result()
            except BaseException:
                stopped.set()
                writers.shutdown(wait=True, cancel_futures=True)
                raise

    def _store(self, job: _Job) -> None:
        path, entry = self.path(job.entry.sha256), job.entry
        with self._locked(entry):
            fault = difference(path, entry) if path.is_file() else "missing"
            if fault is None:
                job.meter.add(entry.size)
                with suppress(OSError):  # the time of last use, for `tandem cache gc`
                    os.utime(path)
            elif job.origin is None:
                what = f"{job.path} is damaged in the local cache: {fault}"
                raise HostError(what, where=str(path), fix="pull this release without --offline")
            else:
                self._fetch(job, job.origin)

    @contextmanager
    def _locked(self, entry: FileEntry) -> Iterator[None]:
        path, lock = self.path(entry.sha256), self.root / "locks" / f"{entry.sha256}.lock"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                yield

    def _fetch(self, job: _Job, origin: Origin) -> None:
        """Continue where a killed pull stopped; if the digest does not match in the end, start over once."""
        entry, partial = job.entry, self._partial(job.entry)
        resumed = _size(partial) > 0
        sha256 = _stream(job, origin, partial)
        if sha256 != entry.sha256 and resumed:
            job.meter.add(-min(_size(partial), entry.size))
            partial.unlink()
            sha256 = _stream(job, origin, partial)
        if sha256 != entry.sha256:
            partial.unlink()
            what = f"{job.path}: sha256 mismatch: expected {entry.sha256}, found {sha256}"
            raise CorruptError(what, where="registry", fix="publish the artifact again")
        partial.replace(self.path(entry.sha256))

    def _partial(self, entry: FileEntry) -> Path:
        """Return a fixed name, unlike a temp name: the next pull continues the file; the lock allows one writer."""
        return self.path(entry.sha256).with_suffix(".partial")


def _stream(job: _Job, origin: Origin, partial: Path) -> str:
    """Append the missing bytes to `partial`; returns the file's sha256. Never writes more than the blob's size."""
    digest, entry = hashlib.sha256(), job.entry
    with partial.open("a+b") as file:
        size = file.tell()
        if size < entry.size:
            file.truncate(size - size % BLOCK_BYTES)
        kept_bytes = _digest_kept(file, digest)
        job.meter.add(min(kept_bytes, entry.size))
        output = open_output(file)
        for piece in parts(_reading(job, origin), kept_bytes, RING.parts, shared=True):
            digest.update(piece)
            output.write(piece)
            job.meter.add(len(piece))
        output.finish()
    return digest.hexdigest()


def _reading(job: _Job, origin: Origin) -> Reading:
    return Reading(origin, job.path, job.entry, job.readers, job.stopped)


def _digest_kept(file: IO[bytes], digest: hashlib._Hash) -> int:
    file.seek(0)
    while piece := file.read(CHUNK_BYTES):
        digest.update(piece)
    return file.tell()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
