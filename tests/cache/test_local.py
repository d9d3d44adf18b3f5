"""The cache: what comes out is what went in, work is done once, and damage is a miss."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.cache import local as caches
from pipeline.cache.collect import collect
from pipeline.cache.local import Cache, Stats
from pipeline.files.atomic import FileDigest, digest_file
from pipeline.files.unfinished import TEMP

KEY = "ab" * 32
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", "graphs")


def entry(cache: Cache, key: str = KEY) -> Path:
    return cache.root / "graphs" / key[:2] / key


def run_all(target, arguments) -> list[int | None]:
    processes = [FORK.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_put_bytes(cache):
    assert cache.get(KEY) is None
    path = cache.put(KEY, b"graph")
    assert cache.get(KEY) == path == entry(cache) / "data"
    assert path.read_bytes() == b"graph"
    assert json.loads((entry(cache) / "entry.json").read_text()).keys() == {"sha256", "size", "created"}


def test_put_file_links(cache, tmp_path):
    source = tmp_path / "graph"
    source.write_bytes(b"graph")
    assert cache.put(KEY, source).samefile(source)


def test_put_first_writer_wins(cache):
    cache.put(KEY, b"first")
    assert cache.put(KEY, b"second").read_bytes() == b"first"


def flip(entry: Path) -> None:
    data = bytearray((entry / "data").read_bytes())
    data[1] ^= 4
    (entry / "data").write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda e: (e / "data").write_bytes(b""),
    "no data": lambda e: (e / "data").unlink(),
    "no entry": lambda e: (e / "entry.json").unlink(),
    "empty entry": lambda e: (e / "entry.json").write_text(""),
    "other entry": lambda e: (e / "entry.json").write_text("[1]"),
    "a file": lambda e: (shutil.rmtree(e), e.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_get_damaged_is_a_miss(cache, damage):
    cache.put(KEY, b"graph")
    DAMAGE[damage](entry(cache))
    assert cache.get(KEY) is None
    assert not entry(cache).exists()
    assert cache.put(KEY, b"graph").read_bytes() == b"graph"
    assert cache.get(KEY) is not None


def test_get_damaged_is_noted(tmp_path):
    notes: list[str] = []
    cache = Cache(tmp_path, "graphs", notes.append)
    cache.put(KEY, b"graph")
    flip(entry(cache))
    cache.get(KEY)
    assert len(notes) == 1
    assert KEY in notes[0]
    assert "sha256" in notes[0]


@pytest.mark.parametrize("damage", ["flipped bit", "no data"])
def test_get_never_drops_what_was_just_put(cache, monkeypatch, damage):
    """A lookup used to remove the entry that another process put while the lookup was failing.

    The moment cannot be hit at will, so hashing is made to take just as long as the other process.
    """

    def slow_digest(path: Path) -> FileDigest:
        monkeypatch.undo()
        if damage == "no data":
            shutil.rmtree(entry(cache))
            cache.put(KEY, b"graph")
            raise FileNotFoundError
        found = digest_file(path)
        shutil.rmtree(entry(cache))
        cache.put(KEY, b"graph")
        return found

    cache.put(KEY, b"graph")
    flip(entry(cache))
    monkeypatch.setattr(caches, "digest_file", slow_digest)
    assert cache.get(KEY) is None
    assert cache.get(KEY) is not None
    assert list(entry(cache).parent.iterdir()) == [entry(cache)]


def _compile_once(cache: Cache, log: Path) -> None:
    with cache.lock(KEY):
        if cache.get(KEY) is None:
            with log.open("a") as file:
                file.write("compiled\n")
            time.sleep(0.05)
            cache.put(KEY, b"graph")
    found = cache.get(KEY)
    os._exit(0 if found and found.read_bytes() == b"graph" else 1)


def test_lock_eight_processes_work_once(cache, tmp_path):
    log = tmp_path / "log"
    assert run_all(_compile_once, [(cache, log)] * 8) == [0] * 8
    assert log.read_text() == "compiled\n"


def test_lock_eight_processes_rebuild_damage_once(cache, tmp_path):
    log = tmp_path / "log"
    cache.put(KEY, b"graph")
    flip(entry(cache))
    assert run_all(_compile_once, [(cache, log)] * 8) == [0] * 8
    assert log.read_text() == "compiled\n"


def _hold(cache: Cache, ready: Path) -> None:
    with cache.lock(KEY):
        ready.write_text("")
        time.sleep(60)


def held(cache: Cache, tmp_path: Path):
    process = FORK.Process(target=_hold, args=(cache, tmp_path / "ready"))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    return process


def test_lock_of_killed_holder_falls_free(cache, tmp_path):
    process = held(cache, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    with cache.lock(KEY):
        assert time.monotonic() - started < 5


def _put_large(cache: Cache) -> None:
    for number in range(100):
        cache.put(f"{number:064x}", os.urandom(50_000))


def test_put_killed_leaves_whole_entries(cache):
    for delay_s in (0.02, 0.05, 0.1):
        process = FORK.Process(target=_put_large, args=(cache,))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for folder in cache.root.glob("graphs/??/[!.]*"):
            assert cache.get(folder.name) is not None
    _put_large(cache)
    assert cache.stats().entries == 100
    assert list(cache.root.rglob(f"{TEMP}*")) == []


def test_stats_counts(cache):
    assert cache.stats() == Stats(0, 0)
    cache.put(KEY, b"12345")
    cache.put("cd" * 32, b"123")
    assert cache.stats() == Stats(2, 8)


def put_aged(cache: Cache, keys: str, age_s: float = 0) -> list[str]:
    names = [letter * 64 for letter in keys]
    for place, name in enumerate(names):
        cache.put(name, b"0123456789")
        used = time.time() - age_s - 100 + place
        os.utime(entry(cache, name) / "entry.json", (used, used))
    return names


def removed(cache: Cache, max_bytes: int, max_age_s: float | None = None) -> Stats:
    """What `collect` removes of the cache's kind."""
    return collect(cache.root, max_bytes, max_age_s)[cache.kind]


def test_gc_removes_least_recently_used(cache):
    names = put_aged(cache, "abcd")
    cache.get(names[0])
    assert removed(cache, max_bytes=20) == Stats(2, 20)
    assert [name for name in names if entry(cache, name).exists()] == [names[0], names[3]]


def test_gc_by_age(cache):
    old, new = put_aged(cache, "a", 1000), put_aged(cache, "b")
    assert removed(cache, max_bytes=1000, max_age_s=500) == Stats(1, 10)
    assert not entry(cache, old[0]).exists()
    assert entry(cache, new[0]).exists()


def test_gc_keeps_what_is_locked(cache, tmp_path):
    cache.put(KEY, b"graph")
    process = held(cache, tmp_path)
    try:
        assert removed(cache, max_bytes=0) == Stats(0, 0)
        assert cache.get(KEY) is not None
    finally:
        process.kill()
        process.join()
    assert removed(cache, max_bytes=0) == Stats(1, 5)
