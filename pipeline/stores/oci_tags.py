"""Small records under tags of a repository, and the lock that orders their writers.

The specification of registries has no write on a condition: of two processes that write one tag, the last wins. Writers
of Tandem take turns by a lock, which is a tag as well. It holds as long as a process does not stand still for
`LEASE_S` between two requests; other writers (`crane tag`, a web page) know nothing of it.
Source of the lock: L. Lamport, "A fast mutual exclusion algorithm" (1987), there attributed to M. Fischer.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pipeline.stores.base import Interrupted
from pipeline.stores.oci_api import ImmutableTagError, OciRegistry
from pipeline.stores.oci_layout import EMPTY, Document, annotations_of, digest_of, layers_of, record

Result = TypeVar("Result")
PREFIX = "_tandem."
"""Start of the tags that hold records, and are no releases."""
LOCK = f"{PREFIX}lock"
LOCK_TYPE = "application/vnd.tandem.lock.v1+json"
RECORD_TYPE = "application/vnd.tandem.record.v1"
OWNER = "dev.tandem.lock.owner"
SETTLE_S, SLOWER = 0.3, 3.0
"""Pause after which a lock that was not overwritten is held; on slow registries so many times what taking it took."""
TRIES = 5
LEASE_S = 20.0
"""A lock that did not change for so long belongs to a process that ended, or stands still."""
POLL_S = 0.1
WAIT_S = 300.0


class LostLockError(Interrupted):
    """Another process took the lock."""


@dataclass(frozen=True)
class Held:
    """A lock that is held since a moment of this process's clock.

    `is_lock` is False where the registry itself refuses to change a tag.
    """

    registry: OciRegistry
    repo: str
    owner: str
    since: float
    is_lock: bool = True

    def check(self) -> None:
        """Make sure, right before a write, that the lock is still held.

        Raises:
            LostLockError: it is not, or will not be for one more request.

        """
        late = time.monotonic() - self.since > LEASE_S / 2
        if self.is_lock and (late or _owner(self.registry, self.repo) != self.owner):
            what = "the registry is too slow: the lock of this repository ended before the next request"
            where = self.registry.session.where(self.repo)
            raise LostLockError(what, where=where, fix="try again: completed transfers are kept")


def read_record(registry: OciRegistry, repo: str, tag: str, limit: int) -> tuple[bytes, str] | None:
    """Return the bytes of a record and the digest of its manifest, or None if there is no such tag."""
    found = registry.manifest(repo, tag)
    if found is None:
        return None
    where = f"{registry.session.where(repo)}:{tag}"
    layers = layers_of(json.loads(found.data), where)
    if len(layers) != 1 or layers[0]["size"] > limit:
        return b"", found.digest
    data = registry.read_small(repo, layers[0]["digest"], layers[0]["size"])
    return (data if digest_of(data) == layers[0]["digest"] else b""), found.digest


def write_record(held: Held, tag: str, data: bytes, *, first: tuple[str, Document] | None = None) -> None:
    """Store a record, whatever its tag held before. `first`: a tag and a manifest that are written just before."""
    registry, repo = held.registry, held.repo
    put_bytes(registry, repo, data)
    held.check()
    if first is not None:
        registry.put_manifest(repo, *first)
    registry.put_manifest(repo, tag, record(RECORD_TYPE, data, {}))


def put_bytes(registry: OciRegistry, repo: str, data: bytes) -> None:
    """Store a small blob, unless the repository has it."""
    digest = digest_of(data)
    if registry.has_blob(repo, digest) is None:
        registry.put_blob(repo, digest, len(data), lambda: iter((data,)))


def under_lock(registry: OciRegistry, repo: str, work: Callable[[Held], Result]) -> Result:
    """Do work while no other process of Tandem has the lock of this repository; again, if the lock is lost on the way.

    Raises:
        Interrupted: other processes hold it, one after the other, for too long, or it was lost several times.

    """
    for attempt in range(TRIES):
        try:
            with locked(registry, repo) as held:
                return work(held)
        except LostLockError:
            if attempt == TRIES - 1:
                raise
    raise AssertionError


@contextmanager
def locked(registry: OciRegistry, repo: str) -> Iterator[Held]:
    """Hold the lock of a repository.

    Raises:
        Interrupted: other processes hold it, one after the other, for too long.

    """
    put_bytes(registry, repo, EMPTY)
    owner, gives_up = uuid.uuid4().hex, time.monotonic() + WAIT_S
    while (held := _taken(registry, repo, owner, gives_up)) is None:
        _check_time(registry, repo, gives_up)
    try:
        yield held
    finally:
        if held.is_lock and time.monotonic() - held.since < LEASE_S:
            _write(registry, repo, "")


def _taken(registry: OciRegistry, repo: str, owner: str, gives_up: float) -> Held | None:
    """Wait until the lock is free, and try to take it once. A repository whose tags cannot change needs no lock.

    Processes that saw it free at the same time have written it by the end of the pause: the last one has it.
    """
    ended = _ended_owner(registry, repo, gives_up)
    began = time.monotonic()
    if _owner(registry, repo) not in ("", ended):
        return None
    try:
        _write(registry, repo, owner)
    except ImmutableTagError:
        return Held(registry, repo, owner, began, is_lock=False)
    time.sleep(max(SETTLE_S, SLOWER * (time.monotonic() - began)))
    return Held(registry, repo, owner, began) if _owner(registry, repo) == owner else None


def _ended_owner(registry: OciRegistry, repo: str, gives_up: float) -> str:
    """Wait until the lock is free, or was not changed for a lease; returns the owner that it then names."""
    seen, since = "", time.monotonic()
    while owner := _owner(registry, repo):
        if owner != seen:
            seen, since = owner, time.monotonic()
        if time.monotonic() - since > LEASE_S:
            break
        _check_time(registry, repo, gives_up)
        time.sleep(POLL_S)
    return owner


def _check_time(registry: OciRegistry, repo: str, gives_up: float) -> None:
    if time.monotonic() > gives_up:
        what = "other processes keep writing to this repository"
        raise Interrupted(what, where=registry.session.where(repo), fix="try again")


def _write(registry: OciRegistry, repo: str, owner: str) -> None:
    registry.put_manifest(repo, LOCK, record(LOCK_TYPE, EMPTY, {OWNER: owner}))


def _owner(registry: OciRegistry, repo: str) -> str:
    found = registry.manifest(repo, LOCK)
    return annotations_of(found.data, LOCK).get(OWNER, "") if found is not None else ""
