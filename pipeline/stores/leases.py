"""Publishing and collecting at the same time, without a lock that a dead process would keep.

A publisher writes a lease, then looks for a collection's mark; a collection writes its mark, then looks for leases. A
store's writes are seen at once by all, so at least one of the two sees the other: the publisher takes its lease back
and waits, or the collection waits for the lease to end. Ages are differences between times that the store itself gave,
never between clocks of hosts, so clocks may be wrong.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from pipeline.errors import HostError
from pipeline.stores.base import Bucket

LEASES = "leases"
MARKS = "collections"
MARK = f"{MARKS}/mark"
COLLECTION_S = 1800.0
"""A collection stops by itself after this long."""
DEAD_MARK_S = 2 * COLLECTION_S
RENEW_S = 60.0
VALID_S = 300.0
"""A publisher that could not renew its lease for this long gives up. Far below what others take for dead."""
DEAD_LEASE_S = 900.0
PATIENCE_S = 120.0
WAIT_S = 0.2


class Lease:
    """A publisher's claim, renewed by a thread: while it is held, no blob disappears."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.id = bucket, uuid.uuid4().hex
        self.round, self.renewed = 0, 0.0
        self.ended = threading.Event()
        self.renew()

    @property
    def key(self) -> str:
        """The object that is the lease now."""
        return f"{LEASES}/{self.id}-{self.round}"

    def renew(self) -> None:
        """A new object first, then the old one goes: there is one at any time."""
        old, at = self.key, _clock()
        self.round += 1
        self.bucket.create(self.key, b"publish\n")
        self.renewed = at
        self.bucket.delete(old)

    def check(self) -> None:
        """Refuse to make visible what may not be there any more.

        Raises:
            HostError: the lease was not renewed in time.

        """
        if _clock() - self.renewed > VALID_S:
            what = f"this publish could not reach the registry for {VALID_S:.0f} s"
            raise HostError(what, where=self.bucket.where, fix="publish again: what was sent is still there")

    def keep(self) -> None:
        """Renew until it ends."""
        while not self.ended.wait(RENEW_S):
            with contextlib.suppress(HostError):  # `check` tells, if it lasts
                self.renew()


@contextlib.contextmanager
def leased(bucket: Bucket) -> Iterator[Lease]:
    """Hold a lease; waits for a collection that runs.

    Raises:
        HostError: it does not end.

    """
    lease = Lease(bucket)
    deadline = time.monotonic() + PATIENCE_S
    while _marked(bucket, lease.key):
        bucket.delete(lease.key)  # a collection waits for leases: without this, both would wait
        if time.monotonic() > deadline:
            fix = f"try again later; if no `tandem gc` runs, its mark is ignored after {DEAD_MARK_S / 60:.0f} minutes"
            raise HostError("unused blobs are being collected here", where=bucket.where, fix=fix)
        time.sleep(WAIT_S)
        lease.renew()
    keeper = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.ended.set()
        keeper.join()
        bucket.delete(lease.key)


@contextlib.contextmanager
def collecting(bucket: Bucket) -> Iterator[Callable[[], bool]]:
    """Hold the mark, once no publisher is left; yields what tells whether there is time left.

    Raises:
        HostError: another collection runs, or somebody goes on publishing.

    """
    mine = uuid.uuid4().hex.encode()
    if not bucket.create(MARK, mine):
        _replace_dead_mark(bucket, mine)
    started = _clock()
    try:
        while _held(bucket):
            if _clock() - started > PATIENCE_S:
                raise HostError("somebody publishes here", where=bucket.where, fix="collect again later")
            time.sleep(WAIT_S)
        yield lambda: _clock() - started < COLLECTION_S
    finally:
        bucket.delete(MARK)


def _replace_dead_mark(bucket: Bucket, mine: bytes) -> None:
    beside = f"{MARKS}/{uuid.uuid4().hex}"
    bucket.create(beside, b"now\n")  # what time it is by the store's clock
    try:
        alive = _marked(bucket, beside)
    finally:
        bucket.delete(beside)
    now = bucket.get(MARK)
    if now is not None and now.data == mine:
        return  # a request that was tried again met its own first try
    if alive or not bucket.swap(MARK, mine, now.token if now else None):
        raise HostError("another collection runs here", where=bucket.where, fix="wait for it to end")


def _held(bucket: Bucket) -> bool:
    """Whether a publisher that may be alive holds a lease; those of dead ones are removed."""
    mark, found = _modified(bucket, MARKS).get(MARK), _modified(bucket, LEASES)
    dead = [key for key, at in found.items() if mark is not None and mark - at > DEAD_LEASE_S]
    for key in dead:
        bucket.delete(key)
    return len(found) > len(dead)


def _marked(bucket: Bucket, beside: str) -> bool:
    """Whether a collection that may be alive runs, by the age of its mark against an object of now."""
    marks = _modified(bucket, MARKS)
    now = (marks | _modified(bucket, LEASES)).get(beside)
    return MARK in marks and (now is None or now - marks[MARK] < DEAD_MARK_S)


def _modified(bucket: Bucket, folder: str) -> dict[str, float]:
    return {one.key: one.modified for one in bucket.list(folder)}


def _clock() -> float:
    """Seconds, going on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
