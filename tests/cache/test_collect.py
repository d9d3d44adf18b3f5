"""The local cache: what no artifact is linked to and nobody used for long goes; all else stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.cache.collect import DAY_S, Unused, collect, entry_stats, folder_sizes, remove_unused
from pipeline.cache.local import Cache, Stats

SHA = "ab" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache with a blob and a folder of shards, both three days old."""
    for path in (blob(tmp_path), shards(tmp_path) / "weights" / "rank-0", shards(tmp_path) / "shards.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - 3 * DAY_S,) * 2)
    (tmp_path / "blobs" / "locks").mkdir()
    return tmp_path


def blob(root: Path) -> Path:
    return root / "blobs" / "sha256" / SHA[:2] / SHA


def shards(root: Path) -> Path:
    return root / "shards" / "key"


def test_what_nobody_uses_goes(root):
    assert remove_unused(root, 2 * DAY_S) == Unused(removed=Stats(2, 15))
    assert not blob(root).exists()
    assert not shards(root).exists()


def test_half_a_blob_goes(root):
    blob(root).rename(blob(root).with_suffix(".partial"))
    assert remove_unused(root, 2 * DAY_S).removed.entries == 2


def test_shards_of_a_killed_build_go(root):
    shards(root).rename(shards(root).with_suffix(".partial"))
    (shards(root).with_suffix(".partial") / "shards.json").unlink()
    assert remove_unused(root, 2 * DAY_S).removed.entries == 2
    assert not shards(root).with_suffix(".partial").exists()


def test_what_is_newer_stays(root):
    assert remove_unused(root, 4 * DAY_S) == Unused(newer=Stats(2, 15))
    assert blob(root).exists()
    assert shards(root).exists()


def test_what_was_used_within_a_day_stays_whatever_is_asked(root):
    for path in (blob(root), shards(root) / "shards.json"):
        os.utime(path)
    assert remove_unused(root, 0) == Unused(newer=Stats(2, 15))


def test_what_an_artifact_is_linked_to_stays(root, tmp_path):
    os.link(blob(root), tmp_path / "artifact-blob")
    os.link(shards(root) / "weights" / "rank-0", tmp_path / "artifact-weights")
    assert remove_unused(root, 0) == Unused(linked=Stats(2, 15))


def test_what_somebody_holds_stays(root):
    with FileLock(root / "blobs" / "locks" / f"{SHA}.lock"), FileLock(shards(root).with_suffix(".lock")):
        assert remove_unused(root, 0) == Unused()


def test_sizes_count_linked_files_once(root):
    os.link(blob(root), blob(root).with_name("cd" * 32))
    assert folder_sizes(root) == {"blobs": 5, "shards": 10}


def test_no_cache_yet(tmp_path):
    assert folder_sizes(tmp_path / "none") == {}
    assert remove_unused(tmp_path / "none", 0) == Unused()


def test_kinds_are_counted_and_collected_apart(tmp_path):
    """Goldens and memos lay among the graphs, so `cache stats` counted a reference output as a compiled graph."""
    sizes = {"graphs": 30, "subgraphs": 2, "memos": 1, "goldens": 20, "files": 3}
    for kind, size in sizes.items():
        Cache(tmp_path, kind).put(f"{kind}-key", b"x" * size)
    counts = {kind: Stats(1, size) for kind, size in sizes.items()}
    assert entry_stats(tmp_path) == counts
    assert Cache(tmp_path, "graphs").get("goldens-key") is None
    os.utime(tmp_path / "goldens/go/goldens-key/entry.json", (1, 1))
    none = dict.fromkeys(counts, Stats(0, 0))
    assert collect(tmp_path, max_bytes=40) == none | {"goldens": Stats(1, 20)}
    assert not (tmp_path / "goldens/go/goldens-key").exists()


def test_collect_without_a_size_removes_by_age_only(tmp_path):
    for key in ("old-key", "new-key"):
        Cache(tmp_path, "graphs").put(key, b"x")
    os.utime(tmp_path / "graphs/ol/old-key/entry.json", (1, 1))
    assert collect(tmp_path, None, DAY_S)["graphs"] == Stats(1, 1)
    assert collect(tmp_path, None)["graphs"] == Stats(0, 0)
