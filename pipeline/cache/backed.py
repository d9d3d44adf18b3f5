"""A local cache with a shared one behind it, and files that machines exchange through the two. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.cache.local import Cache
from pipeline.cache.remote import PARTS, Remote, RemoteCache
from pipeline.errors import HostError
from pipeline.files.atomic import FileDigest
from pipeline.progress import Log
from pipeline.stores.base import in_parallel


class BackedCache:
    """Entries of one kind: the local cache, and behind it the shared one, if there is one.

    `toolchain` are the versions that shape the entries, other than those in their keys.
    """

    def __init__(self, local: Cache, remote: RemoteCache | None, toolchain: Mapping[str, str]) -> None:
        self.local, self.remote, self.toolchain = local, remote, toolchain

    def get(self, key: str) -> Path | None:
        """Return the file under `key`, fetched from the shared cache if the local one lacks it; None for a miss."""
        file = self.local.get(key)
        if file is None and self.remote and self.remote.fetch(key, self.toolchain, self.local):
            file = self.local.get(key)
        return file

    def put(self, key: str, data: bytes) -> Path:
        """Store an entry in both."""
        file = self.local.put(key, data, self.toolchain)
        self.push(key, file)
        return file

    def push(self, key: str, file: Path) -> None:
        """Store a file of the local cache in the shared one, unless that has it."""
        if self.remote:
            self.remote.push(key, file, self.toolchain)


def send_files(remote: Remote, files: Mapping[FileDigest, Path], log: Log) -> None:
    """Store files in the shared cache, those that it lacks.

    Raises:
        HostError: the shared cache cannot be written. ArtifactError: a file has changed.

    """
    shared = remote.open("files", log)
    in_parallel(PARTS, lambda item: shared.send(item[1], item[0]), files.items())


def received_file(remote: Remote, root: Path, digest: FileDigest) -> Path:
    """Return a file that another machine sent, in the local cache at `root`; each file is fetched once.

    Raises:
        HostError: the shared cache lacks the file, or cannot be read.

    """
    local, notes = Cache(root, "files"), list[str]()
    with local.lock(digest.sha256):
        file = BackedCache(local, remote.open("files", notes.append), {}).get(digest.sha256)
    if file is None:
        what = "; ".join([f"the shared cache lacks the file {digest.sha256}", *notes])
        raise HostError(what, where=remote.url, fix="run the build again: it sends what is missing")
    return file
