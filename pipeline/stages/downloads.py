"""Weight files that are read where they are stored: each once, from its start to its end, in parts, and hashed."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import SourceError
from pipeline.files.atomic import write_atomic
from pipeline.sources.remote import RemoteFile

RECORD = "sources.json"
DIGESTS = TypeAdapter(dict[str, str])
PART_BYTES = 8 << 20
AHEAD = 8
"""Parts that are fetched at a time."""


class Downloads:
    """The files of a model, which are asked for one after the other; `checked` is called with each whole file."""

    def __init__(self, stack: ExitStack, checked: Callable[[RemoteFile], None]) -> None:
        self._pool = stack.enter_context(ThreadPoolExecutor(AHEAD, "fetch"))
        self._checked = checked
        self._open: Download | None = None

    def read(self, file: RemoteFile, offset: int, buffer: memoryview) -> int:
        """Fill the buffer; returns fewer bytes where the file ends. A file that was read before is read by its range.

        Raises:
            SourceError: the file before this one differs from its digest; HostError: the store cannot be read.

        """
        if file.found is None and (self._open is None or self._open.file is not file):
            self.finish()
            self._open = Download(file, self._pool)
        if self._open is None or self._open.file is not file or offset < self._open.position:
            return file.read(offset, buffer)
        self._open.skip(offset - self._open.position)
        return self._open.read(buffer)

    def finish(self) -> None:
        """Read the open file to its end, and compare its digest.

        Raises:
            SourceError: another digest than the store lists; HostError: the store cannot be read.

        """
        if self._open is None:
            return
        file, found = self._open.file, self._open.finish()
        self._open = None
        if file.expected not in (None, found):
            what = f"sha256 mismatch: expected {file.expected}, found {found}"
            fix = "try another network, or report the file to the owner of the model"
            raise SourceError(what, where=str(file), fix=fix)
        file.found = found
        self._checked(file)


class Download:
    """One file, whose next parts threads fetch."""

    def __init__(self, file: RemoteFile, pool: ThreadPoolExecutor) -> None:
        self.file, self.position = file, 0
        self._pool, self._digest = pool, hashlib.sha256(file.head)
        self._part = memoryview(file.head)
        self._starts = iter(range(len(file.head), file.size, PART_BYTES))
        self._parts: deque[Future[memoryview]] = deque()
        for _ in range(AHEAD):
            self._fetch_next()

    def read(self, buffer: memoryview) -> int:
        """Fill the buffer from the position on; returns fewer bytes where the file ends."""
        done = 0
        while done < len(buffer) and (piece := self._take(len(buffer) - done)):
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def skip(self, count: int) -> None:
        """Pass over bytes, which are fetched and hashed nevertheless."""
        while count and (piece := self._take(count)):
            count -= len(piece)

    def finish(self) -> str:
        """Read the rest; return the sha256 of the file."""
        self.skip(self.file.size - self.position)
        return self._digest.hexdigest()

    def _take(self, most: int) -> memoryview:
        if not self._part and self._parts:
            self._part = self._parts.popleft().result()
            self._digest.update(self._part)
            self._fetch_next()
        piece, self._part = self._part[:most], self._part[most:]
        self.position += len(piece)
        return piece

    def _fetch_next(self) -> None:
        start = next(self._starts, None)
        if start is not None:
            self._parts.append(self._pool.submit(self._fetch, start))

    def _fetch(self, start: int) -> memoryview:
        part = memoryview(bytearray(min(PART_BYTES, self.file.size - start)))
        return part[: self.file.read(start, part)]


def read_record(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files that were read for these shards, by address; a damaged record counts as none."""
    try:
        return DIGESTS.validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return {}


class SourceRecord:
    """The sha256 of files that were read where they are stored, in a folder of shards: a later call keeps them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._found = read_record(folder)

    def restore(self, files: Sequence[RemoteFile]) -> None:
        """Mark the files that an earlier call read to their end."""
        for file in files:
            file.found = file.found or self._found.get(str(file))

    def add(self, file: RemoteFile) -> None:
        """Record a file that was read to its end."""
        assert file.found is not None
        self._found[str(file)] = file.found
        write_atomic(self._path, DIGESTS.dump_json(self._found, indent=1))
