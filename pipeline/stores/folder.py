"""A registry in a folder: any disk that several machines share, if its renames are atomic and its locks work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.files.atomic import TEMP, atomic_file, create_only, disk_errors, write_atomic
from pipeline.stores.base import Listing, Object
from pipeline.stores.objects import ObjectStore, check_small, checked_pieces

CHUNK_BYTES = 1 << 20
ABSENT = (FileNotFoundError, NotADirectoryError)


def open_folder(path: str) -> ObjectStore:
    """The registry in a folder, which need not exist yet."""
    return ObjectStore(FolderBucket(Path(path).expanduser()))


class FolderBucket:
    """See `Bucket`."""

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def check(self) -> None:
        """A folder keeps its promises, or its writes fail."""

    def size(self, key: str) -> int | None:
        """Size of a file, or None."""
        with contextlib.suppress(*ABSENT):
            return (self.root / key).stat().st_size
        return None

    def upload(self, key: str, source: Path, sha256: str, parts: int) -> None:  # noqa: ARG002 - a copy has one
        """Copy a file in, checked on the way. A link would let later edits of the artifact reach the registry."""
        with atomic_file(self.root / key) as out:
            for piece in checked_pieces(source, sha256, CHUNK_BYTES):
                out.write(piece)

    def read(self, key: str, offset: int, buffer: memoryview) -> int:
        """A part of a file."""
        with (self.root / key).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
            return done

    def get(self, key: str) -> Object | None:
        """A small file; its bytes are its token."""
        with contextlib.suppress(*ABSENT):
            check_small((self.root / key).stat().st_size, str(self.root / key))
            data = (self.root / key).read_bytes()
            return Object(data, data.decode(errors="replace"))
        return None

    def create(self, key: str, data: bytes) -> bool:
        """Write a file that must not be there yet."""
        return create_only(self.root / key, data)

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        """Compare and swap under a lock file, which falls free when its holder dies."""
        path = self.root / key
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                now = self.get(key)
                if (now.token if now else None) != token:
                    return False
                write_atomic(path, data)
                return True

    def list(self, prefix: str) -> Iterator[Listing]:
        """Files below a folder; temp and lock names are hidden."""
        for folder, _, names in os.walk(self.root / prefix):
            for name in sorted(names):
                path = Path(folder) / name
                if not name.startswith((".", TEMP)):
                    with contextlib.suppress(*ABSENT):  # others remove, too
                        found = path.stat()
                        yield Listing(path.relative_to(self.root).as_posix(), found.st_size, found.st_mtime)

    def delete(self, key: str) -> None:
        """Remove a file, if it is there."""
        with disk_errors(self.root / key), contextlib.suppress(*ABSENT):
            (self.root / key).unlink()
