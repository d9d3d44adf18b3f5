"""A registry in a folder: on any shared disk whose renames are atomic and whose locks work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.files.atomic import atomic_file, create_only, disk_errors, write_atomic
from pipeline.files.durable import make_folder
from pipeline.files.home import expanded
from pipeline.files.unfinished import TEMP
from pipeline.stores.base import SMALL_BYTES, Listing, Object
from pipeline.stores.objects import ObjectStore, check_small, checked_pieces
from pipeline.stores.sources import Source

CHUNK_BYTES = 1 << 20
ABSENT = (FileNotFoundError, NotADirectoryError)


def open_folder(path: str) -> ObjectStore:
    """Return the registry in a folder, which need not exist yet."""
    return ObjectStore(FolderBucket(expanded(path)))


class FolderBucket:
    """See `Bucket`."""

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def check(self) -> None:
        """Do nothing: a folder has these guarantees, and its writes fail if it is read-only."""

    def size(self, key: str) -> int | None:
        """Return the size of a file, or None."""
        with contextlib.suppress(*ABSENT):
            return (self.root / key).stat().st_size
        return None

    def upload(self, key: str, source: Source, sha256: str, parts: int) -> None:  # noqa: ARG002 - a copy has one
        """Copy a file in, with its digest checked. A link would let later edits of the artifact reach the registry."""
        with atomic_file(self.root / key) as out:
            for piece in checked_pieces(source, sha256, CHUNK_BYTES):
                out.write(piece)

    def read(self, key: str, offset: int, buffer: memoryview, token: str | None = None) -> int:  # noqa: ARG002 - no ETags
        """Read a part of a file."""
        with (self.root / key).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
            return done

    def get(self, key: str, limit: int = SMALL_BYTES) -> Object | None:
        """Return a small file; its bytes are its token."""
        path = self.root / key
        with contextlib.suppress(*ABSENT), path.open("rb") as file:
            data = file.read(limit + 1)
            check_small(max(len(data), path.stat().st_size), limit, str(path))
            return Object(data, data.decode(errors="replace"))
        return None

    def create(self, key: str, data: bytes) -> bool:
        """Write a file that must not exist yet."""
        return create_only(self.root / key, data)

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        """Compare and swap under a lock file, which the system releases when its holder ends."""
        path = self.root / key
        with disk_errors(path):
            make_folder(path.parent)
            with FileLock(path.with_name(f".{path.name}.lock")):
                current = self.get(key)
                if (current.token if current else None) != token:
                    return False
                write_atomic(path, data)
                return True

    def list(self, prefix: str) -> Iterator[Listing]:
        """Yield the files below a folder; temporary and lock names are left out."""
        for folder, _, names in os.walk(self.root / prefix):
            for name in sorted(names):
                path = Path(folder) / name
                if not name.startswith((".", TEMP)):
                    with contextlib.suppress(*ABSENT):  # other processes remove files, too
                        stat = path.stat()
                        yield Listing(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    def delete(self, key: str) -> None:
        """Remove a file, if it exists."""
        with disk_errors(self.root / key), contextlib.suppress(*ABSENT):
            (self.root / key).unlink()
