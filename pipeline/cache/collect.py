"""How large the local cache is, by kind, and what leaves it: entries used longest ago, and what no artifact links.

Pulled blobs and weight shards are hard-linked into artifacts: a file that has no other name is used by none here. Text
that a target wrote, and downloaded sources, took hours: they are counted, and left to people. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.cache.local import KINDS, Cache, Kind, Stats
from pipeline.files.atomic import remove

DAY_S = 24 * 3600.0
"""Nothing that was used within a day goes: a build or a pull may be about to link it."""


def entry_stats(root: Path) -> dict[Kind, Stats]:
    """Entries and bytes of each kind."""
    return {kind: Cache(root, kind).stats() for kind in KINDS}


def collect(root: Path, max_bytes: int, max_age_s: float | None = None) -> dict[Kind, Stats]:
    """Remove entries used longest ago until all kinds together have at most `max_bytes`, and those older than that.

    Never removes what another process holds. Returns what was removed, by kind.
    """
    stored = [(entry, kind) for kind in KINDS for entry in Cache(root, kind).entries()]
    stored.sort(key=lambda item: item[0].used)
    total, now = sum(entry.size_bytes for entry, _ in stored), time.time()
    removed: dict[Kind, Stats] = dict.fromkeys(KINDS, Stats(0, 0))
    for entry, kind in stored:
        old = max_age_s is not None and now - entry.used > max_age_s
        if (total > max_bytes or old) and Cache(root, kind).remove_if_free(entry.key):
            total -= entry.size_bytes
            removed[kind] += Stats(1, entry.size_bytes)
    return removed


def folder_sizes(root: Path) -> dict[str, int]:
    """Bytes of each folder of the cache; a file with several names in it counts once."""
    folders = sorted(one for one in root.glob("*") if one.is_dir())
    return {one.name: sum(_files(one).values()) for one in folders}


def remove_unused(root: Path, max_age_s: float) -> Stats:
    """Remove blobs and shards that no artifact here is linked to and nobody used for `max_age_s` (at least a day).

    Returns what was removed: blobs, and folders of shards.
    """
    before = time.time() - max(max_age_s, DAY_S)
    blobs = root / "blobs"
    removed = [
        _remove([path], path, blobs / "locks" / f"{path.stem}.lock", before) for path in blobs.glob("sha256/??/*")
    ]
    for listed in (root / "shards").glob("*/shards.json"):
        folder = listed.parent
        files = [path for path in folder.rglob("*") if path.is_file()]
        removed.append(_remove(files, folder, folder.with_suffix(".lock"), before))
    sizes = [size for size in removed if size is not None]
    return Stats(len(sizes), sum(sizes))


def _remove(files: Sequence[Path], whole: Path, lock: Path, before: float) -> int | None:
    """Bytes that went, or None if it is used: linked, newer, or held by somebody."""
    try:
        with FileLock(lock, timeout=0):
            found = [path.stat() for path in files]
            if any(one.st_nlink > 1 for one in found) or max(one.st_mtime for one in found) > before:
                return None
            remove(whole)
    except (Timeout, OSError):  # others remove, too
        return None
    return sum(one.st_size for one in found)


def _files(folder: Path) -> dict[tuple[int, int], int]:
    return {(one.st_dev, one.st_ino): one.st_size for one in _stats(folder)}


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # others remove, too
                yield (Path(where) / name).lstat()
