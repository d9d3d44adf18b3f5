"""A blob of a store as a file: whole, in bounded parts, over failures that pass; and its end, however it comes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.errors import CorruptError
from pipeline.files.atomic import FileDigest
from pipeline.registry import parts
from pipeline.registry.parts import BlobSource, Origin, Reading
from pipeline.stores.base import Blob, Interrupted
from pipeline.stores.objects import checked_pieces

DATA = bytes(range(256)) * 100


class Remote:
    """A store with one blob. `failures` reads end as the list says: an error, or a number of bytes."""

    def __init__(self, *failures: Any) -> None:
        self.failures, self.lock, self.gate = list(failures), threading.Lock(), threading.Event()
        self.largest, self.blocks_from = 0, len(DATA)

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        if offset >= self.blocks_from:
            self.gate.wait(10)
        with self.lock:
            self.largest = max(self.largest, len(buffer))
            failure = self.failures.pop(0) if self.failures else len(buffer)
        if isinstance(failure, Exception):
            raise failure
        piece = DATA[offset : offset + min(failure, len(buffer))]
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.fixture
def readers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SENT_PART_BYTES", 1000)
    monkeypatch.setattr(parts, "FIRST_PAUSE_S", 0.001)


def source(store: Any, readers: ThreadPoolExecutor, size: int = len(DATA)) -> BlobSource:
    entry = FileDigest(hashlib.sha256(DATA[:size]).hexdigest(), size)
    origin = Origin(store, "small", "1.0", where="here/small@1.0", fix="do this")
    return BlobSource(Reading(origin, "weights", entry, readers, threading.Event()))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, len(DATA)])
@pytest.mark.parametrize("piece", [1, 700, 1000, 1 << 20])
def test_a_blob_is_read_as_a_file(readers, size, piece):
    if piece == 1 and size > 1001:
        piece = 7
    store = Remote()
    of = source(store, readers, size)
    pieces = list(checked_pieces(of, of.reading.entry.sha256, piece))
    assert b"".join(pieces) == DATA[:size]
    assert all(len(each) == piece for each in pieces[:-1])
    assert store.largest <= 1000


def test_failures_that_pass_are_retried(readers):
    of = source(Remote(Interrupted("reset"), 3, Interrupted("reset"), 10), readers)
    assert b"".join(checked_pieces(of, of.reading.entry.sha256, 5000)) == DATA


def test_a_blob_that_stays_short_is_an_error_with_the_fix_of_its_origin(readers):
    with pytest.raises(CorruptError, match="weights: truncated in the registry") as caught:
        list(checked_pieces(source(Remote(*[5] * 99), readers), "", 5000))
    assert caught.value.fix == "do this"


def test_another_digest_is_an_error_that_names_the_release(readers):
    with pytest.raises(CorruptError, match="sha256 mismatch") as caught:
        list(checked_pieces(source(Remote(), readers), "a" * 64, 5000))
    assert (caught.value.where, caught.value.fix) == ("here/small@1.0: weights", "do this")


def test_a_file_that_is_left_ends_without_a_wait_for_its_reads(readers):
    """A file may be closed by the garbage collector, in any thread and under any lock, which its reads may need."""
    store = Remote()
    store.blocks_from = 1000
    file = source(store, readers).open("rb")
    assert file.read(10) == DATA[:10]
    started = time.monotonic()
    file.close()
    took = time.monotonic() - started
    store.gate.set()
    assert took < 5
