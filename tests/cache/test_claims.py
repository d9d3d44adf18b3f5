"""Claims: one machine works on a key, the others wait, and the claim of a killed process does not last."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.cache import claims
from pipeline.cache.claims import claimed
from pipeline.cache.remote import Remote, gc
from pipeline.errors import HostError
from pipeline.stores.base import Bucket, open_bucket


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.server)])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Bucket:
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    url = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("s3_url")
    return open_bucket(url)


def held(bucket: Bucket) -> list[str]:
    return [item.key for item in bucket.list("claims")]


def test_claim_is_held_by_one(bucket):
    with claimed(bucket, "graphs/abc") as first, claimed(bucket, "graphs/abc", wait=False) as second:
        assert (first, second) == (True, False)
        assert held(bucket) == ["claims/graphs/abc"]
    assert held(bucket) == []


def test_claims_on_other_keys_are_free(bucket):
    with claimed(bucket, "graphs/abc"), claimed(bucket, "subgraphs/abc", wait=False) as other:
        assert other


def test_claim_is_waited_for(bucket):
    """Of three machines that count with a read and a write, none loses a count."""
    counts = [0]

    def count() -> None:
        with claimed(bucket, "counter"):
            seen = counts[0]
            time.sleep(0.1)
            counts[0] = seen + 1

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3]


def test_claim_of_a_killed_process_is_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(claims, "DEAD_S", 0.5)
    bucket.create("claims/abc", b"killed 7\n")
    with claimed(bucket, "abc", wait=False) as at_once:
        assert not at_once
    started = time.monotonic()
    with claimed(bucket, "abc") as later:
        assert later
        assert time.monotonic() - started >= 0.5
    assert held(bucket) == []


def test_renewed_claim_is_not_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_S", 0.2)
    monkeypatch.setattr(claims, "DEAD_S", 2.0)
    order = []

    def wait() -> None:
        with claimed(bucket, "abc"):
            order.append("second")

    with claimed(bucket, "abc"):
        second = threading.Thread(target=wait)
        second.start()
        time.sleep(4.0)
        order.append("first")
    second.join()
    assert order == ["first", "second"]


class Unreachable:
    """A bucket whose requests fail."""

    def create(self, key: str, data: bytes) -> bool:
        raise HostError("connection refused", where="s3://bucket")


def test_bucket_that_fails_stops_no_build():
    notes = []
    with claimed(Unreachable(), "abc", log=notes.append) as is_mine:
        assert is_mine
    assert notes == ["shared cache: s3://bucket: connection refused; continued without a claim"]


def test_abandoned_claims_are_collected(tmp_path):
    bucket = open_bucket(str(tmp_path))
    for name in ("old", "new"):
        bucket.create(f"claims/graphs/{name}", b"killed 1\n")
    os.utime(tmp_path / "claims/graphs/old", (0, 0))
    gc([Remote(str(tmp_path), "write").open("graphs")], max_bytes=0)
    assert held(bucket) == ["claims/graphs/new"]
