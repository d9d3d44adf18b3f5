"""The sharder's byte streams: read ahead, and write many files in order while hashing them. Independent of tensors."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.files.direct import open_output
from pipeline.sources.packed import Cut, PackedRef, Source, placed
from pipeline.sources.remote import RemoteFile
from pipeline.sources.tensors import File, TensorRef, fill
from pipeline.stages.downloads import Downloads

THREADS = 4
STAGE_BYTES = 4 << 20
STAGES_BYTES = 32 << 20
"""Memory of the stages that threads work on; each file has one more."""

KEPT_TENSORS = 4
"""Tensors of a quantised matrix: values, scales, then zero points and groups, or two of nested scales."""

Bytes: TypeAlias = NDArray[np.uint8]


class Reader:
    """Reads parts of files ahead, in a thread of its own; files in a store through `downloads`."""

    def __init__(self, stack: ExitStack, downloads: Downloads, *, drop_cache: bool) -> None:
        self._stack, self._downloads, self._drop_cache = stack, downloads, drop_cache
        self._open: dict[Path, IO[bytes]] = {}
        self._whole: dict[TensorRef, Bytes] = {}
        self._pool = stack.enter_context(ThreadPoolExecutor(1, "read"))

    def start(self, source: Source, buffer: memoryview) -> Future[None]:
        """Read a tensor's bytes into the buffer, those of a quantised one as `placed` says; the rest becomes zero."""
        if isinstance(source, PackedRef):
            return self._pool.submit(self._read_packed, source, buffer)
        return self._pool.submit(self._read, source, buffer)

    def _read(self, source: TensorRef, buffer: memoryview) -> None:
        self._fill(source.file, source.offset, buffer[: source.nbytes])
        buffer[source.nbytes :] = bytes(len(buffer) - source.nbytes)

    def _read_packed(self, source: PackedRef, buffer: memoryview) -> None:
        """Read the cuts of a matrix; those of its values in the order of the file, which a store sends once."""
        for at, cut in placed(source.cuts):
            part, is_values = buffer[at : at + cut.nbytes], cut.ref == source.values.ref
            if cut.contiguous and (is_values or not isinstance(cut.ref.file, RemoteFile)):
                self._fill(cut.ref.file, cut.whole.offset, part)
            else:
                pieces = self._pieces(cut, in_order=is_values)
                np.frombuffer(part, np.uint8).reshape(pieces.shape)[...] = pieces

    def _pieces(self, cut: Cut, *, in_order: bool) -> Bytes:
        """Return the bytes of a cut, from those of the whole tensor."""
        whole = self._whole_of(cut.ref, in_order=in_order)
        if cut.contiguous:
            return whole[cut.start : cut.start + cut.nbytes]
        return whole.reshape(cut.count, cut.stride)[:, cut.start : cut.start + cut.width]

    def _whole_of(self, ref: TensorRef, *, in_order: bool) -> Bytes:
        """Return the bytes of a tensor; those of the last few are kept, because windows of a matrix share them.

        Scales often stand behind the values of all matrices, so those in a store are read beside the stream.
        """
        if ref not in self._whole:
            while len(self._whole) >= KEPT_TENSORS:
                self._whole.pop(next(iter(self._whole)))
            data = bytearray(ref.nbytes)
            if isinstance(ref.file, RemoteFile) and not in_order:
                ref.file.read(ref.offset, memoryview(data))
            else:
                self._fill(ref.file, ref.offset, memoryview(data))
            self._whole[ref] = np.frombuffer(data, np.uint8)
        return self._whole[ref]

    def _fill(self, file: File, offset: int, buffer: memoryview) -> None:
        if isinstance(file, RemoteFile):
            done = self._downloads.read(file, offset, buffer)
        else:
            done = self._read_local(file, offset, buffer)
        if done < len(buffer):
            what = f"file ends inside a tensor, at byte {offset + done}"
            raise SourceError(what, where=str(file), fix="delete this file and download the checkpoint again")

    def _read_local(self, path: Path, offset: int, buffer: memoryview) -> int:
        if path not in self._open:
            file = self._open[path] = self._stack.enter_context(path.open("rb"))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        descriptor = self._open[path].fileno()
        done = fill(descriptor, offset, buffer)
        if self._drop_cache:
            os.posix_fadvise(descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done


class Stage:
    """Page-aligned memory that collects a file's next bytes."""

    def __init__(self, size_bytes: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, size_bytes), dtype=np.uint8)
        self._used = 0

    @property
    def full(self) -> bool:
        """Whether no byte fits any more."""
        return self._used == self._memory.size

    def add(self, data: Bytes) -> Bytes:
        """Copy as many bytes as fit; returns the rest, flat."""
        if data.size <= self._memory.size - self._used:
            self._memory[self._used : self._used + data.size].reshape(data.shape)[...] = data
            self._used += data.size
            return data[:0]
        data = data.reshape(-1)
        room = self._memory.size - self._used
        self._memory[self._used :] = data[:room]
        self._used += room
        return data[room:]

    def taken(self) -> memoryview:
        """Return the bytes, and start again; the memory must stay as it is until they were used."""
        used, self._used = self._used, 0
        return self._memory[:used].data


class Sink:
    """Files that are written in order by some threads and hashed by others (hashlib releases the lock).

    Each file's bytes are collected in a stage, so that threads have large pieces to work on, however many files share a
    window. A file that has bytes keeps them, and as many are passed over first. `direct` bypasses the page cache where
    the file system supports it.
    """

    def __init__(self, files: Sequence[IO[bytes]], stack: ExitStack, *, direct: bool) -> None:
        self.written, self._kept = 0, [file.tell() for file in files]
        size = min(STAGE_BYTES, max(STAGES_BYTES // len(files), 1 << 20))
        self._stages = [Stage(size) for _ in files]
        self._spare = deque((Stage(size), list[Future[None]]()) for _ in range(STAGES_BYTES // size))
        self._digests = [hashlib.sha256() for _ in files]
        self._writers, self._hashers = (_threads(stack, name, len(files)) for name in ("write", "hash"))
        _wait([self._hasher(rank).submit(_hash_start, file, self._digests[rank]) for rank, file in enumerate(files)])
        self._outputs = [open_output(file, direct=direct) for file in files]

    def put(self, data: Bytes, ranks: Sequence[int]) -> None:
        """Append an array's bytes to the files of some ranks; `data` may change afterwards."""
        for rank in ranks:
            kept = self.skip(data.size, rank)
            rest = self._stages[rank].add(data.reshape(-1)[kept:] if kept else data)
            while self._stages[rank].full:
                self._send(rank)
                rest = self._stages[rank].add(rest)

    def kept(self) -> list[int]:
        """Return for each file how many of its next bytes it had when it was opened."""
        return list(self._kept)

    def skip(self, count: int, rank: int) -> int:
        """Pass over the next bytes of a file; returns how many of them the file had when it was opened."""
        kept = min(count, self._kept[rank])
        self._kept[rank] -= kept
        self.written += count
        return kept

    def finish(self) -> list[str]:
        """Wait until all data has been hashed and written; return the sha256 of each file."""
        for rank in range(len(self._stages)):
            self._send(rank)
        for _, using in self._spare:
            _wait(using)
        for output in self._outputs:
            output.finish()
        return [digest.hexdigest() for digest in self._digests]

    def _send(self, rank: int) -> None:
        """Hand a stage to the threads, and replace it by the one that they were given first."""
        stage = self._stages[rank]
        data = stage.taken()
        hashed = self._hasher(rank).submit(self._digests[rank].update, data)
        written = self._writers[rank % len(self._writers)].submit(self._outputs[rank].write, data)
        self._spare.append((stage, [hashed, written]))
        self._stages[rank], using = self._spare.popleft()
        _wait(using)

    def _hasher(self, rank: int) -> ThreadPoolExecutor:
        return self._hashers[rank % len(self._hashers)]


@dataclass(frozen=True)
class Place:
    """Columns of a matrix, from byte `first` of its rows on, which have `row_bytes` in each file."""

    matrix: str
    row_bytes: int
    first: int = 0


@dataclass
class _Collected:
    """A matrix of one file, the bytes that its rows lack, and where the next columns of each place (first byte) go."""

    whole: Bytes
    lacks: int
    next: dict[int, int] = field(default_factory=dict)

    def add(self, block: Bytes, first: int) -> None:
        start = self.next.get(first, first)
        self.next[first] = start + block.shape[1]
        self.whole[:, start : self.next[first]] = block
        self.lacks -= block.shape[1]


class Columns:
    """Collects the matrices of each file from blocks of their columns; a whole one is appended to its file.

    Places of a matrix are filled in any order, each from its first column to its last.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._open: dict[tuple[str, int], _Collected] = {}

    def put(self, block: Bytes, ranks: Sequence[int], place: Place) -> None:
        """Put the next columns of a place, bytes [rows, bytes of each], into the matrices of some ranks."""
        for rank in ranks:
            key = place.matrix, rank
            if key not in self._open:
                empty = np.empty((len(block), place.row_bytes), np.uint8)
                self._open[key] = _Collected(empty, place.row_bytes)
            self._open[key].add(block, place.first)
            if not self._open[key].lacks:
                self._sink.put(self._open.pop(key).whole, (rank,))


def _hash_start(file: IO[bytes], digest: hashlib._Hash) -> None:
    """Hash the bytes that a file has."""
    file.seek(0)
    while piece := file.read(STAGE_BYTES):
        digest.update(piece)


def _threads(stack: ExitStack, name: str, files: int) -> list[ThreadPoolExecutor]:
    """Return threads; each does its work in order, so that a file's pieces stay in order."""
    return [stack.enter_context(ThreadPoolExecutor(1, name)) for _ in range(min(files, THREADS))]


def _wait(using: list[Future[None]]) -> None:
    """Wait for threads; raise the error of the first that failed."""
    for future in using:
        future.result()
