"""The shared cache of compiled code: nothing in it is trusted, and its failures fail no build."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.cache.local import Cache, Stats
from pipeline.cache.remote import Remote, RemoteCache, gc, pull_all, push_all
from pipeline.errors import HostError
from pipeline.stores.base import open_bucket

TOOLCHAIN = {"backend": "inductor", "torch": "2.13.0+cpu"}
KEY = "ab" * 32


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.server)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("s3_url")


@pytest.fixture
def local(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "local", "graphs")


@pytest.fixture
def cold(tmp_path: Path) -> Cache:
    """Another machine's cache."""
    return Cache(tmp_path / "cold", "graphs")


@pytest.fixture
def notes() -> list[str]:
    return []


def shared(url: str, notes: list[str], mode: str = "write") -> RemoteCache:
    return Remote(url, mode).open("graphs", notes.append)


def fill(local: Cache, url: str, data: bytes = b"graph" * 1000, key: str = KEY) -> None:
    local.put(key, data, TOOLCHAIN)
    assert push_all(local, shared(url, [])) == 1


def test_push_then_fetch(local, cold, url, notes):
    fill(local, url)
    assert shared(url, notes, "read").fetch(KEY, TOOLCHAIN, cold)
    assert cold.get(KEY).read_bytes() == b"graph" * 1000
    assert notes == []


def test_fetch_what_is_not_there(cold, url, notes):
    assert not shared(url, notes).fetch(KEY, TOOLCHAIN, cold)
    assert cold.get(KEY) is None


def test_push_again_sends_nothing(local, url, notes):
    fill(local, url)
    assert push_all(local, shared(url, notes)) == 0


def test_read_mode_writes_nothing(local, url, notes):
    local.put(KEY, b"graph", TOOLCHAIN)
    assert push_all(local, shared(url, notes, "read")) == 0
    assert list(open_bucket(url).list("graphs")) == []


def test_memos_are_not_shared(local, url, notes):
    """What maps to a key is not checked by bytes, so only graphs travel."""
    local.put("cd" * 32, b"a memo")
    assert push_all(local, shared(url, notes)) == 0


def poison(url: str, how: str) -> None:
    """Spoil the entry, as somebody with write access, or a bad disk, could."""
    bucket = open_bucket(url)
    place = f"graphs/{KEY[:2]}/{KEY}/entry.json"
    found = bucket.get(place)
    facts = json.loads(found.data)
    if how == "bytes":
        data = f"graphs/{KEY[:2]}/{KEY}/{facts['sha256']}"
        now = bucket.get(data)
        assert bucket.swap(data, b"evil!" * 1000, now.token)
        return
    if how == "missing":
        bucket.delete(f"graphs/{KEY[:2]}/{KEY}/{facts['sha256']}")
        return
    changes = {
        "toolchain": {"toolchain": {"backend": "inductor", "torch": "1.0"}},
        "key": {"key": "cd" * 32},
        "path": {"sha256": "../../../../etc/passwd"},
        "size": {"size": 10**18},
        "negative": {"size": -1},
        "short": {"size": 7},
        "type": {"toolchain": 3},
    }
    text = b"{" if how == "json" else json.dumps(facts | changes[how]).encode()
    assert bucket.swap(place, text, found.token)


@pytest.mark.parametrize(
    "how", ["bytes", "missing", "toolchain", "key", "path", "size", "negative", "short", "type", "json"]
)
def test_poisoned_entry_is_noted_and_replaced(local, cold, url, notes, how):
    fill(local, url)
    poison(url, how)
    assert not shared(url, notes, "read").fetch(KEY, TOOLCHAIN, cold)
    assert cold.get(KEY) is None
    assert len(notes) == 1
    assert KEY in notes[0] or how == "missing"
    cold.put(KEY, b"rebuilt" * 1000, TOOLCHAIN)  # what a build does then
    assert shared(url, notes).push(KEY, cold.get(KEY), TOOLCHAIN)
    third = Cache(cold.root.parent / "third", "graphs")
    assert shared(url, [], "read").fetch(KEY, TOOLCHAIN, third)
    assert third.get(KEY).read_bytes() == b"rebuilt" * 1000


def test_pull_all_takes_its_own_toolchain(local, cold, url, notes):
    local.put(KEY, b"mine", TOOLCHAIN)
    local.put("cd" * 32, b"other", TOOLCHAIN | {"torch": "1.0"})
    assert push_all(local, shared(url, notes)) == 2
    assert pull_all(cold, shared(url, notes), TOOLCHAIN) == 1
    assert cold.get(KEY).read_bytes() == b"mine"
    assert pull_all(cold, shared(url, notes), TOOLCHAIN) == 0


def test_stats_and_gc(local, url, notes):
    for number in range(3):
        fill(local, url, b"x" * 1000, f"{number:02}" * 32)
        time.sleep(1.1 if url.startswith("s3") else 0.02)  # S3 dates have seconds
    found = shared(url, notes)
    assert (found.stats().entries, found.stats().size_bytes) == (3, 3000)
    assert gc([found], 2000) == {"graphs": Stats(1, 1000)}
    assert {entry.key[:2] for entry, _ in found.entries()} == {"01", "02"}
    assert gc([found], 0)["graphs"].entries == 2
    assert list(open_bucket(url).list("graphs")) == []


def test_gc_by_age(local, tmp_path, notes):
    url = str(tmp_path / "shared")
    fill(local, url)
    for path in Path(url).rglob("entry.json"):
        os.utime(path, (time.time() - 1000,) * 2)
    assert gc([shared(url, notes)], 1 << 30, 2000)["graphs"].entries == 0
    assert gc([shared(url, notes)], 1 << 30, 500)["graphs"].entries == 1


def test_gc_takes_the_oldest_of_all_kinds(tmp_path, notes):
    url = str(tmp_path / "shared")
    caches = [Remote(url, "write").open(kind, notes.append) for kind in ("graphs", "subgraphs")]
    for age, (remote, key) in enumerate((of, number * 64) for number in "01" for of in caches):
        local = Cache(tmp_path / "local", remote.kind)
        assert remote.push(key, local.put(key, b"x" * 1000, TOOLCHAIN), TOOLCHAIN)
        place = Path(url) / remote.kind / key[:2] / key / "entry.json"
        os.utime(place, (time.time() - 1000 + age,) * 2)
    assert gc(caches, 1500) == {"graphs": Stats(2, 2000), "subgraphs": Stats(1, 1000)}
    assert [entry.key for entry, _ in caches[1].entries()] == ["1" * 64]


class Down:
    """A bucket that cannot be reached."""

    where = "s3://down"

    def __getattr__(self, name: str):
        def fail(*args):
            raise HostError("the server cannot be reached", where=self.where)

        return fail


def test_failures_are_noted(cold, notes, tmp_path):
    remote = RemoteCache(Down(), "graphs", "write", notes.append)
    assert not remote.fetch(KEY, TOOLCHAIN, cold)
    (tmp_path / "data").write_bytes(b"graph")
    assert not remote.push(KEY, tmp_path / "data", TOOLCHAIN)
    assert len(notes) == 2
    assert all("cannot be reached" in note for note in notes)


def test_a_hub_is_refused():
    with pytest.raises(HostError, match="a Hub cannot hold a cache"):
        Remote("hf://org").open("graphs")
