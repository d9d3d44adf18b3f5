"""Publish and collect at the same time, without a lock that a killed process would keep.

A publisher writes a lease, then looks for a collection's mark; a collection writes its mark, then looks for leases. A
store's writes are visible to all at once, so at least one of the two finds the other's: the publisher withdraws its
lease and waits, or the collection waits for the lease to end. Ages are differences between times of the store's clock,
never between clocks of hosts, so wrong clocks do no harm.
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
"""A publisher that could not renew its lease for this long gives up: far below `DEAD_LEASE_S`."""
DEAD_LEASE_S = 900.0
PATIENCE_S = 120.0
WAIT_S = 0.2


class Lease:
    """A publisher's claim, renewed by a thread: while it is held, no blob is collected."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.id = bucket, uuid.uuid4().hex
        self.round, self.renewed = 0, 0.0
        self.ended = threading.Event()
        self.renew()

    @property
    def key(self) -> str:
        """Return the key of the lease's current object."""
        return f"{LEASES}/{self.id}-{self.round}"

    def renew(self) -> None:
        """Write a new object, then delete the old one, so that one exists at any time."""
        old, renewed = self.key, _clock()
        self.round += 1
        self.bucket.create(self.key, b"publish\n")
        self.renewed = renewed
        self.bucket.delete(old)

    def check(self) -> None:
        """Stop a publish whose blobs may have been collected.

        Raises:
            HostError: the lease was not renewed in time.

        """
        if _clock() - self.renewed > VALID_S:
            what = f"the registry was unreachable for {VALID_S:.0f} s during this publish"
            raise HostError(what, where=self.bucket.where, fix="publish again: blobs that were sent are not sent twice")

    def may_have_ended(self) -> bool:
        """Return whether a collection may have counted this lease as a killed publisher's."""
        return _clock() - self.renewed > DEAD_LEASE_S

    def keep(self) -> None:
        """Renew the lease until it ends."""
        while not self.ended.wait(RENEW_S):
            with contextlib.suppress(HostError):  # `check` raises if the failure persists
                self.renew()


@contextlib.contextmanager
def leased(bucket: Bucket) -> Iterator[Lease]:
    """Hold a lease; waits for a running collection.

    Raises:
        HostError: the collection does not end.

    """
    lease = Lease(bucket)
    deadline = time.monotonic() + PATIENCE_S
    while _marked(bucket, lease.key):
        bucket.delete(lease.key)  # a collection waits for leases: without this, both would wait
        if time.monotonic() > deadline:
            fix = f"try again later; the mark of a killed `tandem gc` is ignored after {DEAD_MARK_S / 60:.0f} minutes"
            raise HostError("a collection of unused blobs is in progress", where=bucket.where, fix=fix)
        time.sleep(WAIT_S)
        lease.renew()
    keeper = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.ended.set()
        keeper.join()
        with contextlib.suppress(HostError):  # what was published stays published; the lease ends by its age
            bucket.delete(lease.key)


@contextlib.contextmanager
def collecting(bucket: Bucket) -> Iterator[Callable[[], bool]]:
    """Hold the mark, once no publish is in progress; yields a function that returns whether there is time left.

    Raises:
        HostError: another collection runs, or a publish does not end.

    """
    mine = uuid.uuid4().hex.encode()
    if not bucket.create(MARK, mine):
        _replace_dead_mark(bucket, mine)
    started = _clock()
    try:
        while _held(bucket):
            if _clock() - started > PATIENCE_S:
                raise HostError("a publish is in progress", where=bucket.where, fix="collect again later")
            time.sleep(WAIT_S)
        _remove_old_references(bucket)
        yield lambda: _clock() - started < COLLECTION_S
    finally:
        bucket.delete(MARK)


def _replace_dead_mark(bucket: Bucket, mine: bytes) -> None:
    reference = f"{MARKS}/{uuid.uuid4().hex}"
    bucket.create(reference, b"now\n")  # the present time by the store's clock
    try:
        alive = _marked(bucket, reference)
    finally:
        bucket.delete(reference)
    current = bucket.get(MARK)
    if current is not None and current.data == mine:
        return  # a retried request met its own first attempt
    if alive or not bucket.swap(MARK, mine, current.token if current else None):
        raise HostError("another collection is in progress", where=bucket.where, fix="wait for it to end")


def _remove_old_references(bucket: Bucket) -> None:
    """Remove the references of collections that were killed, or whose last requests were lost."""
    modified = _modified(bucket, MARKS)
    for key, written in modified.items():
        if key != MARK and modified.get(MARK, written) - written > DEAD_LEASE_S:
            bucket.delete(key)


def _held(bucket: Bucket) -> bool:
    """Return whether a publisher that may be running holds a lease; remove the leases of killed publishers."""
    mark, leases = _modified(bucket, MARKS).get(MARK), _modified(bucket, LEASES)
    dead = [key for key, modified in leases.items() if mark is not None and mark - modified > DEAD_LEASE_S]
    for key in dead:
        bucket.delete(key)
    return len(leases) > len(dead)


def _marked(bucket: Bucket, reference: str) -> bool:
    """Return whether a collection that may be alive runs: its mark is compared with the just written `reference`."""
    marks = _modified(bucket, MARKS)
    now = (marks | _modified(bucket, LEASES)).get(reference)
    return MARK in marks and (now is None or now - marks[MARK] < DEAD_MARK_S)


def _modified(bucket: Bucket, folder: str) -> dict[str, float]:
    return {entry.key: entry.modified for entry in bucket.list(folder)}


def _clock() -> float:
    """Return seconds of a clock that continues while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
