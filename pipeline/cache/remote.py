"""The shared cache, in a folder or S3 bucket: all builds read it, trusted builds write it.

    <kind>/<2 hex>/<key>/<sha256>      a graph, a subgraph's object file, a golden, or a file for nodes of a cluster
    <kind>/<2 hex>/<key>/entry.json    its digest and toolchain
    claims/<kind>/<key>                a machine compiles it (`cache.claims`)

Entries are checked: one with a wrong digest or another toolchain is a miss, and a build with write access replaces it.
A writer can still store false code or goldens with their own digest under a key, so give write access to CI alone.
Files have their digest as their key. Trust comes from the signature of a release, not from this cache.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cache.claims import remove_abandoned
from pipeline.cache.local import KEY, Cache, Kind, Stats
from pipeline.errors import HostError
from pipeline.files.atomic import FileDigest
from pipeline.files.limits import parse_json
from pipeline.files.unfinished import temp_file
from pipeline.progress import Log, no_log
from pipeline.stores.base import Bucket, check_bucket, open_bucket

SHARED: tuple[Kind, ...] = ("graphs", "subgraphs")
"""Kinds of compiled code."""
STORED: tuple[Kind, ...] = (*SHARED, "goldens", "files")
"""Kinds of entries that a shared cache has."""
PART_BYTES = 4 << 20
PARTS = 4
ENTRY_BYTES = 64 << 10
"""Limit for the facts of an entry."""
LIMIT_BYTES = 4 << 30
"""Limit for one entry, so that a wrong size in an entry cannot fill the disk; not for files, which may be shards."""

Mode = Literal["read", "write"]


@dataclass(frozen=True)
class Remote:
    """The URL of a shared cache, and the access of this build. Plain data that can be sent to workers."""

    url: str
    mode: Mode = "read"

    def __post_init__(self) -> None:
        """Check the URL before a build starts to work."""
        check_bucket(self.url)

    def open(self, kind: Kind, log: Log = no_log) -> RemoteCache:
        """Open the entries of one kind."""
        return RemoteCache(open_bucket(self.url), kind, self.mode, log)


@dataclass(frozen=True)
class Entry:
    """The contents of an `entry.json`."""

    key: str
    sha256: str
    size: int
    toolchain: dict[str, str]


class RemoteCache:
    """Entries of one kind. Failures are logged and never fail a build: what is missing is compiled instead."""

    def __init__(self, bucket: Bucket, kind: Kind, mode: Mode = "read", log: Log = no_log) -> None:
        self.bucket, self.kind, self.mode, self.log = bucket, kind, mode, log

    def fetch(self, key: str, toolchain: Mapping[str, str], local: Cache) -> bool:
        """Download an entry into the local cache; return False if the shared cache has no usable entry."""
        try:
            return self._fetch(key, toolchain, local)
        except (HostError, FileNotFoundError) as error:
            self.log(f"shared cache: {error}")
            return False

    def push(self, key: str, data: Path, toolchain: Mapping[str, str]) -> bool:
        """Store an entry, replacing an unusable entry; return False if a usable entry exists, or storing fails."""
        if self.mode != "write":
            return False
        try:
            return self._push(key, data, toolchain)
        except HostError as error:
            self.log(f"shared cache: {error}")
            return False

    def send(self, data: Path, digest: FileDigest) -> None:
        """Store a file under its sha256, unless a file of that name and size is stored.

        Raises:
            HostError: it cannot be stored. ArtifactError: it has another digest.

        """
        sha256, present = digest.sha256, self.bucket.get(self._place(digest.sha256, "entry.json"), ENTRY_BYTES)
        if present is None or self.bucket.size(self._place(sha256, sha256)) != digest.size:
            self.bucket.upload(self._place(sha256, sha256), data, sha256, PARTS)
            self._record(Entry(sha256, sha256, digest.size, {}), present.token if present else None)

    def entries(self) -> Iterator[tuple[Entry, float]]:
        """Yield every readable entry and its time of writing by the store's clock."""
        for item in self.bucket.list(self.kind):
            _, _, key, name = [*item.key.split("/"), "", "", ""][:4]
            if name == "entry.json" and KEY.fullmatch(key) and (entry := self._entry(key)):
                yield entry, item.modified

    def stats(self) -> Stats:
        """Return the number and size of the entries."""
        sizes = [entry.size for entry, _ in self.entries()]
        return Stats(len(sizes), sum(sizes))

    def delete(self, entry: Entry) -> None:
        """Remove an entry. A build that is reading it compiles instead."""
        self.bucket.delete(self._place(entry.key, "entry.json"))
        self.bucket.delete(self._place(entry.key, entry.sha256))

    def _fetch(self, key: str, toolchain: Mapping[str, str], local: Cache) -> bool:
        entry = self._entry(key)
        if entry is None:
            return False
        if entry.toolchain != dict(toolchain):
            self.log(f"shared cache: {key} is from another toolchain: not used")
            return False
        with temp_file(local.root / "remote") as (temp, file):
            digest = hashlib.sha256()
            for piece in self._pieces(entry):
                digest.update(piece)
                file.write(piece)
            file.flush()
            if digest.hexdigest() != entry.sha256:
                self.log(f"shared cache: {key} has sha256 {digest.hexdigest()}, expected {entry.sha256}: not used")
                return False
            local.put(key, temp, toolchain)
        return True

    def _pieces(self, entry: Entry) -> Iterator[memoryview]:
        """Yield an entry's bytes in pieces; each piece reuses the memory of the one before."""
        buffer = memoryview(bytearray(min(PART_BYTES, entry.size)))
        for start in range(0, entry.size, PART_BYTES):
            part = buffer[: min(PART_BYTES, entry.size - start)]
            yield part[: self.bucket.read(self._place(entry.key, entry.sha256), start, part)]

    def _push(self, key: str, data: Path, toolchain: Mapping[str, str]) -> bool:
        with data.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entry = Entry(key, sha256, data.stat().st_size, dict(toolchain))
        present = self.bucket.get(self._place(key, "entry.json"), ENTRY_BYTES)
        if present is not None and self._sound(key, toolchain):
            return False
        self.bucket.upload(self._place(key, sha256), data, sha256, PARTS)
        return self._record(entry, present.token if present else None)

    def _record(self, entry: Entry, token: str | None) -> bool:
        text = json.dumps({"key": entry.key, "sha256": entry.sha256, "size": entry.size, "toolchain": entry.toolchain})
        return self.bucket.swap(self._place(entry.key, "entry.json"), text.encode(), token)

    def _sound(self, key: str, toolchain: Mapping[str, str]) -> bool:
        """Return whether an entry is usable. Builds of one graph may differ in their bytes: the first entry stays."""
        entry = self._entry(key)
        if entry is None or entry.toolchain != dict(toolchain):
            return False
        if self.bucket.size(self._place(key, entry.sha256)) != entry.size:
            return False
        digest = hashlib.sha256()
        for piece in self._pieces(entry):
            digest.update(piece)
        return digest.hexdigest() == entry.sha256

    def _entry(self, key: str) -> Entry | None:
        stored = self.bucket.get(self._place(key, "entry.json"), ENTRY_BYTES)
        if stored is None:
            return None
        try:
            facts = parse_json(stored.data)
            entry = Entry(str(facts["key"]), str(facts["sha256"]), int(facts["size"]), dict(facts["toolchain"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            self.log(f"shared cache: {key} has a damaged entry: ignored")
            return None
        plain = entry.key == key and len(entry.sha256) == 64 and entry.sha256.isalnum()
        plain &= self.kind != "files" or entry.sha256 == key
        if not plain or entry.size < 0 or (entry.size > LIMIT_BYTES and self.kind != "files"):
            self.log(f"shared cache: {key} has a malformed entry: ignored")
            return None
        return entry

    def _place(self, key: str, name: str) -> str:
        assert KEY.fullmatch(key), key
        return f"{self.kind}/{key[:2]}/{key}/{name}"


def push_all(local: Cache, remote: RemoteCache) -> int:
    """Push every entry of the local cache with a recorded toolchain; return the number of new ones."""
    return sum(remote.push(key, data, about) for key, data, about in local.with_toolchains())


def pull_all(local: Cache, remote: RemoteCache, toolchain: Mapping[str, str]) -> int:
    """Download every entry of this toolchain that the local cache lacks; return their number."""
    keys = [entry.key for entry, _ in remote.entries() if entry.toolchain == dict(toolchain)]
    return sum(remote.fetch(key, toolchain, local) for key in keys if local.get(key) is None)


def gc(caches: Sequence[RemoteCache], max_bytes: int | None, max_age_s: float | None = None) -> dict[Kind, Stats]:
    """Remove the oldest entries of all kinds until at most `max_bytes` remain, and all older than `max_age_s`.

    None is no limit.

    The caches are those of one bucket, whose abandoned claims are removed too.
    """
    for cache in caches[:1]:
        remove_abandoned(cache.bucket)
    entries = [(modified, entry, cache) for cache in caches for entry, modified in cache.entries()]
    left = sum(entry.size for _, entry, _ in entries)
    removed = {cache.kind: Stats(0, 0) for cache in caches}
    for modified, entry, cache in sorted(entries, key=lambda item: item[0]):
        is_old = max_age_s is not None and time.time() - modified > max_age_s
        if (max_bytes is not None and left > max_bytes) or is_old:
            cache.delete(entry)
            left -= entry.size
            removed[cache.kind] += Stats(1, entry.size)
    return removed
