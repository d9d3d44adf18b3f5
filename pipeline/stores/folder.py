"""A registry in a folder.

    blobs/sha256/<2 hex>/<sha256>    releases/<name>/<version>/manifest.json    aliases/<name>/<alias>

Works on any disk that several machines share, as long as its renames are atomic and its locks work.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.errors import ArtifactError, InputError
from pipeline.files import TEMP, atomic_file, create_only, disk_errors, write_atomic
from pipeline.stores.base import Alias

CHUNK_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
DIGEST = re.compile(r"[0-9a-f]{64}")


class FolderStore:
    """See `Store`."""

    def __init__(self, path: str) -> None:
        self.root = Path(path).expanduser()

    def has_blob(self, sha256: str, size: int) -> bool:
        """Whether a blob is stored with this size."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self._blob(sha256).stat().st_size == size
        return False

    def put_blob(self, sha256: str, source: Path) -> None:
        """Copy a file in, checked on the way. A link would let later edits of the artifact reach the registry."""
        digest = hashlib.sha256()
        with atomic_file(self._blob(sha256)) as out, source.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
                out.write(piece)
            if digest.hexdigest() != sha256:
                what = f"sha256 {digest.hexdigest()}, should be {sha256}"
                raise ArtifactError(what, where=str(source), fix="build the artifact again")

    @contextlib.contextmanager
    def open_blob(self, sha256: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        """A blob's bytes from `offset` on.

        Raises:
            ArtifactError: it is missing.

        """
        try:
            file = self._blob(sha256).open("rb")
        except FileNotFoundError as error:
            raise ArtifactError(f"blob {sha256} is missing", where=str(self.root), fix="publish it again") from error
        with file:
            file.seek(offset)
            yield iter(lambda: file.read(CHUNK_BYTES), b"")

    def create_manifest(self, name: str, version: str, data: bytes) -> bool:
        """Create a release; the first writer wins."""
        return create_only(self._release(name, version), data)

    def read_manifest(self, name: str, version: str) -> bytes | None:
        """A release's manifest, or None."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self._release(name, version).read_bytes()
        return None

    def names(self) -> list[str]:
        """Names that have releases."""
        return sorted({path.parent.parent.name for path in (self.root / "releases").glob("*/*/manifest.json")})

    def versions(self, name: str) -> list[str]:
        """Published versions of a name."""
        return sorted(path.parent.name for path in (self.root / "releases" / _plain(name)).glob("*/manifest.json"))

    def aliases(self, name: str) -> dict[str, str]:
        """Aliases of a name and the versions they point at."""
        found = (self.root / "aliases" / _plain(name)).glob("[!.]*")
        return {path.name: path.read_text() for path in sorted(found)}

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Where an alias points, or None."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            version = self._alias(name, alias).read_text()
            return Alias(version, version)
        return None

    def swap_alias(self, name: str, alias: str, version: str, token: str | None) -> bool:
        """Compare and swap under a lock file."""
        path = self._alias(name, alias)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                now = self.read_alias(name, alias)
                if (now.token if now else None) != token:
                    return False
                write_atomic(path, version.encode())
                return True

    def _blob(self, sha256: str) -> Path:
        assert DIGEST.fullmatch(sha256), sha256
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def _release(self, name: str, version: str) -> Path:
        return self.root / "releases" / _plain(name) / _plain(version) / "manifest.json"

    def _alias(self, name: str, alias: str) -> Path:
        return self.root / "aliases" / _plain(name) / _plain(alias)


def _plain(name: str) -> str:
    """A name that is one folder, and never a temp name."""
    if not NAME.fullmatch(name) or name.startswith(TEMP):
        raise InputError(f"{name!r} is not a plain name", where="registry", fix="use letters, digits, . _ + -")
    return name
