"""Claims on keys of a shared cache, so that of several machines one compiles an entry and the others wait for it.

    claims/<kind>/<key>       the claim's holder, and how often the holder renewed it

A claim saves work and protects nothing: entries are addressed by content, and the first one stored stays. A claim that
is not renewed for `DEAD_S`, by the clock of the machine that waits, belongs to a killed process and is taken over. No
clocks of two machines are compared. Imports no torch.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

from pipeline.errors import HostError
from pipeline.progress import Log, no_log
from pipeline.stores.base import Bucket

CLAIMS = "claims"
RENEW_S = 3.0
DEAD_S = 20.0
POLL_S = 0.5
ABANDONED_S = 24 * 3600.0


@contextlib.contextmanager
def claimed(bucket: Bucket, name: str, *, wait: bool = True, log: Log = no_log) -> Iterator[bool]:
    """Hold the claim on `name` among all machines that share a bucket; yields whether it is held.

    Without `wait`, the claim is not held if another machine has it. A bucket that fails is logged, and the claim then
    counts as held: two machines may do the same work, which is only slower.
    """
    claim = _Claim(bucket, f"{CLAIMS}/{name}")
    try:
        held = claim.take(wait=wait)
    except HostError as error:
        log(f"shared cache: {error}; continued without a claim")
        yield True
        return
    if not held:
        yield False
        return
    with claim.renewed():
        yield True


def remove_abandoned(bucket: Bucket) -> None:
    """Remove the claims of killed processes that no machine has asked for since."""
    for item in bucket.list(CLAIMS):
        if time.time() - item.modified > ABANDONED_S:
            bucket.delete(item.key)


class _Claim:
    """One process's claim. Its text changes with each renewal, and with it the token that others compare."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self.key, self.holder, self.round = bucket, key, uuid.uuid4().hex, 0

    def take(self, *, wait: bool) -> bool:
        """Take the claim if it is free, or when its holder ends or dies; return False if it is held and not `wait`."""
        token, unchanged_since = None, time.monotonic()
        while not self.bucket.create(self.key, self._text()):
            present = self.bucket.get(self.key)
            if present is None:
                continue
            if present.data == self._text():
                return True  # a retried request met its own first attempt
            if present.token != token:
                token, unchanged_since = present.token, time.monotonic()
            if time.monotonic() - unchanged_since > DEAD_S and self.bucket.swap(self.key, self._text(), token):
                return True
            if not wait:
                return False
            time.sleep(POLL_S)
        return True

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim in a thread while the block runs, then remove it."""
        ended = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(ended,), name="claim", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            with contextlib.suppress(HostError):  # others take it over
                self._remove()

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(HostError):
                if not self._renew():
                    return

    def _renew(self) -> bool:
        """Write the next text; return False if another process took the claim over."""
        present = self.bucket.get(self.key)
        if present is None or present.data != self._text():
            return False
        self.round += 1
        return self.bucket.swap(self.key, self._text(), present.token)

    def _remove(self) -> None:
        present = self.bucket.get(self.key)
        if present is not None and present.data == self._text():
            self.bucket.delete(self.key)

    def _text(self) -> bytes:
        return f"{self.holder} {self.round}\n".encode()
