"""The content-addressed store of compiled graphs: key -> bytes, checked whenever they are taken out. Imports no torch.

Local; `remote_cache` shares it. It never decides what a key is made of: see `backends.base.cache_key`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.files.atomic import FileDigest, atomic_dir, digest_file, disk_errors, link_or_copy, remove, temp_name
from pipeline.progress import Log, no_log

KEY = re.compile(r"[0-9a-z][0-9a-z._-]+")


def default_root() -> Path:
    """`$TANDEM_CACHE`, or `artifacts/cache` here."""
    return Path(os.environ.get("TANDEM_CACHE", "artifacts/cache")).absolute()


@dataclass(frozen=True)
class Stats:
    """Entries and their bytes."""

    entries: int
    size_bytes: int


@dataclass(frozen=True)
class _Held:
    """An entry on disk: when it was last used, and its size."""

    key: str
    used: float
    size_bytes: int


class Cache:
    """Entries `<root>/graphs/<2 hex>/<key>/{data, entry.json}`, each renamed into place whole."""

    def __init__(self, root: Path, log: Log = no_log) -> None:
        self.root = root
        self.log = log

    def get(self, key: str) -> Path | None:
        """The file stored under `key`, or None. An entry that does not match its digest is removed: a miss."""
        entry = self._entry(key)
        data = entry / "data"
        try:
            with data.open("rb") as file:  # while it is open, no other file gets its number
                recorded, found = _recorded(entry), digest_file(data)
                if recorded != found:
                    self.log(f"cache entry {key} is damaged ({_difference(recorded, found)}): removed")
                    number = os.fstat(file.fileno()).st_ino
                    _drop(entry, unless=lambda moved: _whole(moved) and (moved / "data").stat().st_ino != number)
                    return None
        except OSError:
            if os.path.lexists(entry):  # else nobody has put it yet
                _drop(entry, unless=_whole)  # somebody may have put it just now
            return None
        with contextlib.suppress(OSError):  # a cache that is only read keeps no time of use
            os.utime(entry / "entry.json")
        return data

    def put(self, key: str, data: bytes | Path, about: Mapping[str, str] | None = None) -> Path:
        """Store bytes, or a file, which is linked and must not be written to any more. The first writer wins.

        `about` is kept beside a graph: the toolchain that made it, which sharing it needs.

        Raises:
            HostError: no space, read-only or forbidden.

        """
        entry = self._entry(key)
        if self.get(key) is None:
            with atomic_dir(entry) as folder:
                _place(data, folder / "data")
                found = digest_file(folder / "data")
                facts: dict[str, Any] = {"sha256": found.sha256, "size": found.size, "created": int(time.time())}
                facts |= {"about": dict(about)} if about is not None else {}
                (folder / "entry.json").write_text(json.dumps(facts))
        return entry / "data"

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold `key` among all processes that share this cache; a dead holder's lock falls free."""
        with self._lock(key):
            yield

    def graphs(self) -> Iterator[tuple[str, Path, dict[str, str]]]:
        """Key, file and toolchain of every graph whose toolchain is known, each checked."""
        for held in self._held():
            try:
                about = json.loads((self._entry(held.key) / "entry.json").read_text()).get("about")
            except (OSError, ValueError, AttributeError):
                continue
            if isinstance(about, dict) and (data := self.get(held.key)) is not None:
                yield held.key, data, about

    def stats(self) -> Stats:
        """Count what is stored."""
        held = self._held()
        return Stats(len(held), sum(one.size_bytes for one in held))

    def gc(self, max_bytes: int, max_age_s: float | None = None) -> Stats:
        """Remove what was used longest ago until at most `max_bytes` remain, and all not used for `max_age_s`.

        Never removes what somebody holds. Returns what was removed.
        """
        held = sorted(self._held(), key=lambda one: one.used)
        total, now = sum(one.size_bytes for one in held), time.time()
        removed = freed = 0
        for one in held:
            old = max_age_s is not None and now - one.used > max_age_s
            if (total - freed > max_bytes or old) and self._remove_if_free(one.key):
                freed += one.size_bytes
                removed += 1
        return Stats(removed, freed)

    def _remove_if_free(self, key: str) -> bool:
        lock = self._lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            _drop(self._entry(key), unless=lambda _: False)
        finally:
            lock.release()
        return True

    def _lock(self, key: str) -> FileLock:
        folder = self.root / "locks"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{_checked(key)}.lock")

    def _entry(self, key: str) -> Path:
        return self.root / "graphs" / key[:2] / _checked(key)

    def _held(self) -> list[_Held]:
        held = []
        for data in self.root.glob("graphs/??/[!.]*/data"):
            with contextlib.suppress(OSError):  # others remove, too
                used = (data.parent / "entry.json").stat().st_mtime
                held.append(_Held(data.parent.name, used, data.stat().st_size))
        return held


def _drop(entry: Path, unless: Callable[[Path], bool]) -> None:
    """Take an entry out in one step; put it back if, by then, another process has put a good one there."""
    aside = temp_name(entry)
    with contextlib.suppress(FileNotFoundError), disk_errors(entry):
        entry.rename(aside)
        if unless(aside) and not entry.exists():
            aside.rename(entry)
    remove(aside)


def _whole(entry: Path) -> bool:
    return (entry / "data").is_file() and (entry / "entry.json").is_file()


def _checked(key: str) -> str:
    assert KEY.fullmatch(key), key
    return key


def _place(data: bytes | Path, target: Path) -> None:
    if isinstance(data, Path):
        link_or_copy(data, target)
    else:
        target.write_bytes(data)


def _recorded(entry: Path) -> FileDigest | None:
    """What the entry says of itself, or None if that cannot be read."""
    try:
        facts = json.loads((entry / "entry.json").read_text())
        return FileDigest(facts["sha256"], facts["size"])
    except (ValueError, KeyError, TypeError):
        return None


def _difference(recorded: FileDigest | None, found: FileDigest) -> str:
    if recorded is None:
        return "entry.json is unreadable"
    if recorded.size != found.size:
        return f"{found.size} bytes, recorded {recorded.size}"
    return f"sha256 {found.sha256[:12]}..., recorded {recorded.sha256[:12]}..."
