"""The content-addressed store of compiled graphs: key -> bytes, checked whenever they are taken out. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipeline.files import atomic_dir, digest_file, disk_errors


def default_root() -> Path:
    """`$TANDEM_CACHE`, or `artifacts/cache` here."""
    return Path(os.environ.get("TANDEM_CACHE", "artifacts/cache")).absolute()


@dataclass(frozen=True)
class Stats:
    """Entries and their bytes."""

    entries: int
    size_bytes: int


class Cache:
    """Entries `<root>/<2 hex>/<key>/{data, entry.json}`, each renamed into place whole."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Path | None:
        """The file stored under `key`, or None. An entry that does not match its digest is removed: a miss."""
        entry = self._entry(key)
        data = entry / "data"
        try:
            recorded = json.loads((entry / "entry.json").read_text())
            found = digest_file(data)
        except (OSError, ValueError):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        if recorded != {"sha256": found.sha256, "size": found.size}:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return data

    def put(self, key: str, data: bytes) -> Path:
        """Store `data`; the first writer of a key wins."""
        entry = self._entry(key)
        if self.get(key) is None:
            with atomic_dir(entry) as folder:
                (folder / "data").write_bytes(data)
                found = digest_file(folder / "data")
                (folder / "entry.json").write_text(json.dumps({"sha256": found.sha256, "size": found.size}))
        return entry / "data"

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold `key` among all processes that share this cache; a dead holder's lock falls free."""
        folder = self.root / "locks"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            yield

    def stats(self) -> Stats:
        """Count what is stored."""
        sizes = [path.stat().st_size for path in self._data_files()]
        return Stats(len(sizes), sum(sizes))

    def gc(self, max_bytes: int, max_age_s: float | None = None) -> Stats:
        """Remove the oldest entries until at most `max_bytes` remain; returns what was removed."""
        files = sorted(self._data_files(), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        removed = freed = 0
        for path in files:
            age_s = time.time() - path.stat().st_mtime
            if total - freed <= max_bytes and (max_age_s is None or age_s <= max_age_s):
                continue
            freed += path.stat().st_size
            removed += 1
            shutil.rmtree(path.parent)
        return Stats(removed, freed)

    def _entry(self, key: str) -> Path:
        return self.root / "graphs" / key[:2] / key

    def _data_files(self) -> list[Path]:
        return list(self.root.glob("graphs/??/*/data"))
