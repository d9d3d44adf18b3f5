"""The content-addressed store of one kind of entry: key -> bytes, checked on every read.

    graphs       compiled graphs (`backends.base.cache_key`)
    subgraphs    object files that graphs share
    memos        from the inputs of a graph to its key, so that no graph is traced twice
    goldens      reference outputs of the gates
    files        weights and artifacts that a build sends to the nodes of a cluster, by sha256

`cache.remote` shares all but memos with other machines.

It does not compute keys. Imports no torch.
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
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline.files.atomic import FileDigest, atomic_dir, digest_file, disk_errors, link_or_copy
from pipeline.files.home import expanded
from pipeline.files.limits import parse_json
from pipeline.files.unfinished import remove, temp_name
from pipeline.progress import Log, no_log

KEY = re.compile(r"[0-9a-z][0-9a-z._-]+")
Kind = Literal["graphs", "subgraphs", "memos", "goldens", "files"]
KINDS: tuple[Kind, ...] = ("graphs", "subgraphs", "memos", "goldens", "files")


def default_root() -> Path:
    """Return `$TANDEM_CACHE`, or `artifacts/cache` in the working directory if it is absent or blank.

    Raises:
        InputError: it starts with `~`, and the account has no home.

    """
    return expanded(os.environ.get("TANDEM_CACHE", "").strip() or "artifacts/cache", "TANDEM_CACHE").absolute()


@dataclass(frozen=True)
class Stats:
    """Number of entries and their size."""

    entries: int
    size_bytes: int

    def __add__(self, other: Stats) -> Stats:
        return Stats(self.entries + other.entries, self.size_bytes + other.size_bytes)


@dataclass(frozen=True)
class StoredEntry:
    """An entry on disk: time of the last use, and size."""

    key: str
    used: float
    size_bytes: int


class Cache:
    """Entries `<root>/<kind>/<2 hex>/<key>/{data, entry.json}`; each appears by one rename."""

    def __init__(self, root: Path, kind: Kind, log: Log = no_log) -> None:
        self.root = root
        self.kind: Kind = kind
        self.log = log

    def get(self, key: str) -> Path | None:
        """Return the file stored under `key`, or None. An entry that does not match its digest is removed: a miss."""
        entry = self._entry(key)
        data = entry / "data"
        try:
            with data.open("rb") as file:  # an open file keeps its inode number
                recorded, actual = _recorded(entry), digest_file(data)
                if recorded != actual:
                    self.log(f"cache entry {key} is damaged ({_difference(recorded, actual)}): removed")
                    number = os.fstat(file.fileno()).st_ino
                    _drop(entry, unless=lambda moved: _whole(moved) and (moved / "data").stat().st_ino != number)
                    return None
        except OSError:
            if os.path.lexists(entry):  # else no process has put it yet
                _drop(entry, unless=_whole)  # another process may have put it just now
            return None
        with contextlib.suppress(OSError):  # a read-only cache keeps no time of use
            os.utime(entry / "entry.json")
        return data

    def put(self, key: str, data: bytes | Path, about: Mapping[str, str] | None = None) -> Path:
        """Store bytes, or a file, which is linked and must not change afterwards. The first writer wins.

        `about` is the toolchain of compiled code; only entries with one can be shared.

        Raises:
            HostError: no space, read-only or forbidden.

        """
        entry = self._entry(key)
        if self.get(key) is None:
            with atomic_dir(entry) as folder:
                _place(data, folder / "data")
                digest = digest_file(folder / "data")
                facts: dict[str, Any] = {"sha256": digest.sha256, "size": digest.size, "created": int(time.time())}
                facts |= {"about": dict(about)} if about is not None else {}
                (folder / "entry.json").write_text(json.dumps(facts), encoding="utf-8")
        return entry / "data"

    def size_bytes(self, key: str) -> int:
        """Return the size of an entry; 0 if there is none."""
        try:
            return (self._entry(key) / "data").stat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock on `key` among all processes that share this cache; the lock of a killed process is released.

        Yields whether it is held: without `wait`, not if another process holds it.
        """
        lock = self._lock(key)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def with_toolchains(self) -> Iterator[tuple[str, Path, dict[str, str]]]:
        """Yield key, file and toolchain of every entry with a recorded toolchain, after checking its digest."""
        for stored in self.entries():
            try:
                about = parse_json((self._entry(stored.key) / "entry.json").read_bytes()).get("about")
            except (OSError, ValueError, AttributeError):
                continue
            if isinstance(about, dict) and (data := self.get(stored.key)) is not None:
                yield stored.key, data, about

    def stats(self) -> Stats:
        """Return the number and size of the entries."""
        entries = self.entries()
        return Stats(len(entries), sum(entry.size_bytes for entry in entries))

    def entries(self) -> list[StoredEntry]:
        """Return every entry."""
        entries = []
        for data in self.root.glob(f"{self.kind}/??/[!.]*/data"):
            with contextlib.suppress(OSError):  # another process may remove it
                used = (data.parent / "entry.json").stat().st_mtime
                entries.append(StoredEntry(data.parent.name, used, data.stat().st_size))
        return entries

    def remove_if_free(self, key: str) -> bool:
        """Remove an entry unless another process holds its lock; return whether it was removed."""
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
        return self.root / self.kind / key[:2] / _checked(key)


def _drop(entry: Path, unless: Callable[[Path], bool]) -> None:
    """Remove an entry by a rename; put it back if another process stored a good entry in the meantime."""
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
    """Return the digest in `entry.json`, or None if it cannot be read."""
    try:
        facts = parse_json((entry / "entry.json").read_bytes())
        return FileDigest(facts["sha256"], facts["size"])
    except (ValueError, KeyError, TypeError):
        return None


def _difference(recorded: FileDigest | None, actual: FileDigest) -> str:
    if recorded is None:
        return "entry.json is unreadable"
    if recorded.size != actual.size:
        return f"{actual.size} bytes, expected {recorded.size}"
    return f"sha256 {actual.sha256[:12]}..., expected {recorded.sha256[:12]}..."
