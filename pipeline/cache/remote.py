"""The cache of compiled graphs that machines share, in a folder or S3 bucket: read by builds, written by trusted ones.

    graphs/<2 hex>/<key>/<sha256>    the graph        graphs/<2 hex>/<key>/entry.json    its digest and toolchain

Nothing in it is trusted: an entry whose bytes do not have their digest, or that another toolchain made, is a miss, and
a build that may write replaces it. Whoever can write here can still name a digest of their own for a key, so give
write access to CI alone; a release is trusted by its signature, not by this cache. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cache.local import KEY, Cache, Stats
from pipeline.errors import HostError
from pipeline.files.atomic import temp_name
from pipeline.progress import Log, no_log
from pipeline.stores.base import Bucket, open_bucket

PART_BYTES = 4 << 20
PARTS = 4
LIMIT_BYTES = 4 << 30
"""No graph is larger: an entry that says so must not fill the disk."""

Mode = Literal["read", "write"]


@dataclass(frozen=True)
class Remote:
    """Where a shared cache is, and whether this build may write there. Plain data: it travels to workers."""

    url: str
    mode: Mode = "read"

    def open(self, log: Log = no_log) -> RemoteCache:
        """The cache itself."""
        return RemoteCache(open_bucket(self.url), self.mode, log)


@dataclass(frozen=True)
class Entry:
    """What `entry.json` says of a graph."""

    key: str
    sha256: str
    size: int
    toolchain: dict[str, str]


class RemoteCache:
    """See the module. Its failures never fail a build: they are noted, and the graph is compiled."""

    def __init__(self, bucket: Bucket, mode: Mode = "read", log: Log = no_log) -> None:
        self.bucket, self.mode, self.log = bucket, mode, log

    def fetch(self, key: str, toolchain: Mapping[str, str], local: Cache) -> bool:
        """Bring a graph into the local cache; False if there is none that may be used."""
        try:
            return self._fetch(key, toolchain, local)
        except (HostError, FileNotFoundError) as error:
            self.log(f"shared cache: {error}")
            return False

    def push(self, key: str, data: Path, toolchain: Mapping[str, str]) -> bool:
        """Store a graph, in the place of an entry that may not be used; False if it is there, or cannot be stored."""
        if self.mode != "write":
            return False
        try:
            return self._push(key, data, toolchain)
        except HostError as error:
            self.log(f"shared cache: {error}")
            return False

    def entries(self) -> Iterator[tuple[Entry, float]]:
        """Every entry that can be read, and when it was written by the store's clock."""
        for one in self.bucket.list("graphs"):
            _, _, key, name = [*one.key.split("/"), "", "", ""][:4]
            if name == "entry.json" and KEY.fullmatch(key) and (found := self._entry(key)):
                yield found, one.modified

    def stats(self) -> Stats:
        """Count what is stored."""
        sizes = [one.size for one, _ in self.entries()]
        return Stats(len(sizes), sum(sizes))

    def gc(self, max_bytes: int, max_age_s: float | None = None) -> Stats:
        """Remove the oldest entries until at most `max_bytes` remain, and all older than `max_age_s`.

        A build that reads one meanwhile compiles its graph instead.
        """
        found = sorted(self.entries(), key=lambda item: item[1])
        total, removed, freed = sum(one.size for one, _ in found), 0, 0
        for one, modified in found:
            old = max_age_s is not None and time.time() - modified > max_age_s
            if total - freed > max_bytes or old:
                self.bucket.delete(_place(one.key, "entry.json"))
                self.bucket.delete(_place(one.key, one.sha256))
                removed, freed = removed + 1, freed + one.size
        return Stats(removed, freed)

    def _fetch(self, key: str, toolchain: Mapping[str, str], local: Cache) -> bool:
        entry = self._entry(key)
        if entry is None:
            return False
        if entry.toolchain != dict(toolchain):
            self.log(f"shared cache: {key} was made by another toolchain: not used")
            return False
        temp = temp_name(local.root / "remote")
        temp.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = self._download(entry, temp)
            if found != entry.sha256:
                self.log(f"shared cache: {key} has sha256 {found}, should be {entry.sha256}: not used")
                return False
            local.put(key, temp, toolchain)
        finally:
            temp.unlink(missing_ok=True)
        return True

    def _download(self, entry: Entry, temp: Path) -> str:
        digest = hashlib.sha256()
        with temp.open("xb") as file:
            for piece in self._pieces(entry):
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def _pieces(self, entry: Entry) -> Iterator[memoryview]:
        """A graph's bytes, in memory that the next piece takes over."""
        buffer = memoryview(bytearray(min(PART_BYTES, entry.size)))
        for start in range(0, entry.size, PART_BYTES):
            part = buffer[: min(PART_BYTES, entry.size - start)]
            yield part[: self.bucket.read(_place(entry.key, entry.sha256), start, part)]

    def _push(self, key: str, data: Path, toolchain: Mapping[str, str]) -> bool:
        with data.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entry = Entry(key, sha256, data.stat().st_size, dict(toolchain))
        there = self.bucket.get(_place(key, "entry.json"))
        if there is not None and self._sound(key, toolchain):
            return False
        self.bucket.upload(_place(key, sha256), data, sha256, PARTS)
        text = json.dumps({"key": key, "sha256": sha256, "size": entry.size, "toolchain": entry.toolchain})
        return self.bucket.swap(_place(key, "entry.json"), text.encode(), there.token if there else None)

    def _sound(self, key: str, toolchain: Mapping[str, str]) -> bool:
        """Whether an entry looks usable: two builds of a graph need not be the same bytes, so the first one stays."""
        entry = self._entry(key)
        if entry is None or entry.toolchain != dict(toolchain):
            return False
        if self.bucket.size(_place(key, entry.sha256)) != entry.size:
            return False
        digest = hashlib.sha256()
        for piece in self._pieces(entry):
            digest.update(piece)
        return digest.hexdigest() == entry.sha256

    def _entry(self, key: str) -> Entry | None:
        found = self.bucket.get(_place(key, "entry.json"))
        if found is None:
            return None
        try:
            facts = json.loads(found.data)
            entry = Entry(str(facts["key"]), str(facts["sha256"]), int(facts["size"]), dict(facts["toolchain"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            self.log(f"shared cache: {key} has a damaged entry: not used")
            return None
        plain = entry.key == key and len(entry.sha256) == 64 and entry.sha256.isalnum()
        if not plain or not 0 <= entry.size <= LIMIT_BYTES:
            self.log(f"shared cache: {key} has an entry that cannot be: not used")
            return None
        return entry


def push_all(local: Cache, remote: RemoteCache) -> int:
    """Push every graph of the local cache whose toolchain is known; returns how many were new."""
    return sum(remote.push(key, data, about) for key, data, about in local.with_toolchains())


def pull_all(local: Cache, remote: RemoteCache, toolchain: Mapping[str, str]) -> int:
    """Bring every graph that this toolchain made and that is not here; returns how many came."""
    keys = [one.key for one, _ in remote.entries() if one.toolchain == dict(toolchain)]
    return sum(remote.fetch(key, toolchain, local) for key in keys if local.get(key) is None)


def _place(key: str, name: str) -> str:
    assert KEY.fullmatch(key), key
    return f"graphs/{key[:2]}/{key}/{name}"
