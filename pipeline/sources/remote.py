"""A file of weights that stays in a store and is read by ranges. Independent of the kind of store. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.stores.base import Interrupted

START_BYTES = 64 << 10
"""Fetched at once with a header, which is smaller in most files."""

PAGE_BYTES = 64 << 10
"""Fetched at once for small tensors, many of which lie in one page."""
REQUESTS = 8
"""Pages that are fetched at a time."""

TRIES = 6


def _pages(offset: int, length: int) -> range:
    """Return the numbers of the pages that hold a range of a file."""
    return range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))


@dataclass(eq=False)
class RemoteFile:
    """A file by its name in a source; equal only to itself.

    `fetch` fills a buffer from an offset on and returns the number of bytes. `expected` is the sha256 that the store
    lists, if it lists one; `found` the sha256 of the bytes that were read, once the whole file was.
    """

    name: str
    size: int
    where: str
    fetch: Callable[[int, memoryview], int] = field(repr=False)
    expected: str | None = None
    found: str | None = None
    head: bytes = field(default=b"", repr=False)
    """First bytes, which were fetched for the header."""
    pages: dict[int, bytes] = field(default_factory=dict, repr=False)
    """Pages with small tensors that say how others are stored, by number."""

    def __str__(self) -> str:
        return self.where

    def start(self, length: int) -> bytes:
        """Return the first bytes of the file; no byte is fetched twice."""
        if length > len(self.head):
            more = bytearray(min(max(length, START_BYTES), self.size) - len(self.head))
            self.head += bytes(more[: self.read(len(self.head), memoryview(more))])
        return self.head[:length]

    def piece(self, offset: int, length: int) -> bytes:
        """Return a few bytes; each page of the file that has some is fetched once."""
        start = offset % PAGE_BYTES
        return b"".join(map(self._page, _pages(offset, length)))[start : start + length]

    def prefetch(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Fetch the pages of pieces (offset, length), several at a time: a request takes longer than its bytes."""
        numbers = {number for offset, length in pieces for number in _pages(offset, length)}
        with ThreadPoolExecutor(REQUESTS, "pages") as pool:
            list(pool.map(self._page, sorted(numbers.difference(self.pages))))

    def _page(self, number: int) -> bytes:
        if number not in self.pages:
            at = number * PAGE_BYTES
            page = bytearray(min(PAGE_BYTES, self.size - at))
            known = self.head[at : at + len(page)]
            page[: len(known)] = known
            if len(known) < len(page):
                self.read(at + len(known), memoryview(page)[len(known) :])
            self.pages[number] = bytes(page)
        return self.pages[number]

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer; returns fewer bytes where the file ends. Transient failures are retried.

        Raises:
            HostError: the store cannot be read.

        """
        done, wanted = 0, min(len(buffer), self.size - offset)
        while done < wanted and (count := self._fetch(offset + done, buffer[done:wanted])):
            done += count
        return done

    def _fetch(self, offset: int, buffer: memoryview) -> int:
        for attempt in range(TRIES - 1):
            try:
                return self.fetch(offset, buffer)
            except Interrupted:
                time.sleep(0.2 * 2**attempt)
        return self.fetch(offset, buffer)
