"""A registry in a folder: `blobs/sha256/<xx>/<sha>`, `releases/<name>/<version>/manifest.json`, `aliases/<name>/<alias>`."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from filelock import FileLock

from pipeline.errors import ArtifactError, InputError
from pipeline.files import atomic_file, create_only, write_atomic

CHUNK_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class FolderStore:
    """See `Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has_blob(self, sha256: str) -> bool:
        """Whether a blob is stored."""
        return self._blob(sha256).is_file()

    def put_blob(self, sha256: str, source: Path) -> None:
        """Copy a file in, checked on the way."""
        if not self.has_blob(sha256):
            _copy(source, self._blob(sha256), sha256)

    def get_blob(self, sha256: str, target: Path) -> None:
        """Copy a blob out, checked on the way."""
        if not self.has_blob(sha256):
            raise ArtifactError(f"blob {sha256[:12]} is missing", where=str(self.root), fix="publish the artifact again")
        _copy(self._blob(sha256), target, sha256)

    def put_manifest(self, name: str, version: str, data: bytes) -> bytes | None:
        """Create a release; the first writer wins."""
        path = self._release(name, version)
        return None if create_only(path, data) else path.read_bytes()

    def get_manifest(self, name: str, version: str) -> bytes | None:
        """A release's manifest, or None."""
        with contextlib.suppress(FileNotFoundError):
            return self._release(name, version).read_bytes()
        return None

    def versions(self, name: str) -> list[str]:
        """Published versions of a name."""
        return sorted(path.parent.name for path in (self.root / "releases" / _plain(name)).glob("*/manifest.json"))

    def get_alias(self, name: str, alias: str) -> str | None:
        """The version an alias points at, or None."""
        with contextlib.suppress(FileNotFoundError):
            return self._alias(name, alias).read_text()
        return None

    def swap_alias(self, name: str, alias: str, old: str | None, new: str) -> bool:
        """Compare and swap under a lock file."""
        path = self._alias(name, alias)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if self.get_alias(name, alias) != old:
                return False
            write_atomic(path, new.encode())
        return True

    def _blob(self, sha256: str) -> Path:
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def _release(self, name: str, version: str) -> Path:
        return self.root / "releases" / _plain(name) / _plain(version) / "manifest.json"

    def _alias(self, name: str, alias: str) -> Path:
        return self.root / "aliases" / _plain(name) / _plain(alias)


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copy while hashing; a copy that does not match never appears."""
    digest = hashlib.sha256()
    with atomic_file(target) as out, source.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            out.write(piece)
        if digest.hexdigest() != sha256:
            raise ArtifactError(
                f"sha256 {digest.hexdigest()[:12]}..., expected {sha256[:12]}...", where=str(source), fix="publish again"
            )


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is not a plain name", where="registry", fix="use letters, digits, . _ -")
    return name
