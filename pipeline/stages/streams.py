"""The sharder's byte streams: read ahead, and write many files in order while hashing them. Independent of tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from pipeline.errors import SourceError
from pipeline.files.direct import open_output
from pipeline.sources.tensors import TensorRef

HASHERS = 4
STAGE_BYTES = 4 << 20
STAGES_BYTES = 32 << 20


class Reader:
    """Reads parts of files ahead, in a thread of its own."""

    def __init__(self, stack: ExitStack, *, drop_cache: bool) -> None:
        self._stack, self._drop_cache = stack, drop_cache
        self._open: dict[Path, IO[bytes]] = {}
        self._pool = stack.enter_context(ThreadPoolExecutor(1, "read"))

    def start(self, source: TensorRef, buffer: memoryview) -> Future[None]:
        """Read a tensor's bytes into the buffer; the rest of the buffer becomes zero."""
        return self._pool.submit(self._read, source, buffer)

    def _read(self, source: TensorRef, buffer: memoryview) -> None:
        if source.file not in self._open:
            file = self._open[source.file] = self._stack.enter_context(source.file.open("rb"))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        descriptor, done = self._open[source.file].fileno(), 0
        while done < source.nbytes:
            count = os.preadv(descriptor, [buffer[done : source.nbytes]], source.offset + done)
            if not count:
                fix = "delete this file and download the checkpoint again"
                raise SourceError(
                    f"file ends inside a tensor, at byte {source.offset + done}", where=str(source.file), fix=fix
                )
            done += count
        if done < len(buffer):
            buffer[done:] = bytes(len(buffer) - done)
        if self._drop_cache:
            os.posix_fadvise(descriptor, source.offset, source.nbytes, os.POSIX_FADV_DONTNEED)


class Sink:
    """Files that are written in order by one thread and hashed by others (hashlib releases the lock).

    `direct` bypasses the page cache where the file system supports it; `STAGES_BYTES` limits its buffers.
    """

    def __init__(self, files: Sequence[IO[bytes]], stack: ExitStack, *, direct: bool) -> None:
        self.written = 0
        stage = min(STAGE_BYTES, max(STAGES_BYTES // len(files), 1 << 20))
        self._outputs = [open_output(file, stage, direct=direct) for file in files]
        self._digests = [hashlib.sha256() for _ in files]
        self._writer = stack.enter_context(ThreadPoolExecutor(1, "write"))
        hashers = [stack.enter_context(ThreadPoolExecutor(1, "hash")) for _ in range(min(len(files), HASHERS))]
        self._hashers = [hashers[i % len(hashers)] for i in range(len(files))]

    def put(self, data: bytes | memoryview, ranks: Sequence[int]) -> list[Future[None]]:
        """Append to the files of some ranks; the futures are done when `data` may change."""
        self.written += len(data) * len(ranks)
        hashed = [self._hashers[rank].submit(self._digests[rank].update, data) for rank in ranks]
        return [*hashed, *(self._writer.submit(self._outputs[rank].write, data) for rank in ranks)]

    def finish(self) -> list[str]:
        """Wait until all data has been hashed and written; return the sha256 of each file."""
        last = [pool.submit(lambda: None) for pool in self._hashers]
        last += [self._writer.submit(output.finish) for output in self._outputs]
        for future in last:
            future.result()
        return [digest.hexdigest() for digest in self._digests]
