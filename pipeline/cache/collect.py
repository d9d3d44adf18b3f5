"""The size of the local cache by kind, and its collection: entries used longest ago, and unlinked blobs and shards.

Pulled blobs and weight shards are hard-linked into artifacts: no artifact on this machine uses a file with one link.
Text from `tandem distill` and downloaded sources took hours: they are counted and never removed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.cache.local import KINDS, Cache, Kind, Stats
from pipeline.files.unfinished import remove

SENT = "sent"
"""Folder of the sources and artifacts that a build sent to this node of a cluster."""
DAY_S = 24 * 3600.0
"""Least age of a file that is removed: a build or a pull may be about to link a newer one."""


def entry_stats(root: Path) -> dict[Kind, Stats]:
    """Return number and size of the entries of each kind."""
    return {kind: Cache(root, kind).stats() for kind in KINDS}


def collect(root: Path, max_bytes: int | None, max_age_s: float | None = None) -> dict[Kind, Stats]:
    """Remove entries used longest ago until all kinds together have at most `max_bytes`, and those older than that.

    None is no limit. Entries that another process holds stay. Returns number and size of the removed entries by kind.
    """
    stored = [(entry, kind) for kind in KINDS for entry in Cache(root, kind).entries()]
    stored.sort(key=lambda item: item[0].used)
    total, now = sum(entry.size_bytes for entry, _ in stored), time.time()
    removed: dict[Kind, Stats] = dict.fromkeys(KINDS, Stats(0, 0))
    for entry, kind in stored:
        is_old = max_age_s is not None and now - entry.used > max_age_s
        is_over = max_bytes is not None and total > max_bytes
        if (is_over or is_old) and Cache(root, kind).remove_if_free(entry.key):
            total -= entry.size_bytes
            removed[kind] += Stats(1, entry.size_bytes)
    return removed


def folder_sizes(root: Path) -> dict[str, int]:
    """Return the size of each folder of the cache; a file with several links in a folder counts once."""
    folders = sorted(folder for folder in root.glob("*") if folder.is_dir())
    return {folder.name: sum(_files(folder).values()) for folder in folders}


NONE = Stats(0, 0)


@dataclass(frozen=True)
class Unused:
    """Blobs and folders of shards by what a collection did: removed, kept since they are newer, kept since linked."""

    removed: Stats = NONE
    newer: Stats = NONE
    linked: Stats = NONE

    def __add__(self, other: Unused) -> Unused:
        return Unused(self.removed + other.removed, self.newer + other.newer, self.linked + other.linked)


def remove_unused(root: Path, max_age_s: float) -> Unused:
    """Remove blobs and shards without links to artifacts that were not used for `max_age_s` (at least a day).

    Folders that were sent to this node count as removed without a size: their files are links.
    """
    before = time.time() - max(max_age_s, DAY_S)
    blobs = root / "blobs"
    found = [_remove([path], path, blobs / "locks" / f"{path.stem}.lock", before) for path in blobs.glob("sha256/??/*")]
    for folder in (root / "shards").glob("*/"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        found.append(_remove(files, folder, folder.with_suffix(".lock"), before))
    sent = sum(_remove_old(folder, before) for folder in (root / SENT).glob("*/"))
    return sum(found, Unused(removed=Stats(sent, 0)))


def _remove(files: Sequence[Path], whole: Path, lock: Path, before: float) -> Unused:
    """Remove files unless they are linked or newer; of those that another process holds, nothing is counted."""
    try:
        with FileLock(lock, timeout=0):
            stats = [path.stat() for path in files]
            size = Stats(1, sum(stat.st_size for stat in stats))
            if any(stat.st_nlink > 1 for stat in stats):
                return Unused(linked=size)
            if max((stat.st_mtime for stat in stats), default=0.0) > before:
                return Unused(newer=size)
            remove(whole)
    except (Timeout, OSError):  # another process may remove it
        return Unused()
    return Unused(removed=size)


def _remove_old(folder: Path, before: float) -> bool:
    """Remove a folder that was sent to this node, whose files are links; return False if it was used since."""
    with contextlib.suppress(OSError):  # another process may remove it
        if folder.stat().st_mtime <= before:
            remove(folder)
            return True
    return False


def _files(folder: Path) -> dict[tuple[int, int], int]:
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in _stats(folder)}


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may remove it
                yield (Path(where) / name).lstat()
