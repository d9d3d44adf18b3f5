"""What a registry store is: blobs by sha256, manifests that are created once, aliases that are compared and swapped.

A store moves bytes; what a release means, and the order of writing, are `publish.py`'s and `pull.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from pipeline.errors import HostError

STORES: dict[str, str] = {"file": "pipeline.stores.folder:FolderStore"}
"""Scheme of a registry's URL -> its store. A URL without a scheme is a folder."""


@dataclass(frozen=True)
class Alias:
    """The version an alias points at, and the token that a swap must show."""

    version: str
    token: str


class Store(Protocol):
    """One registry. Readers see a whole release or none: blobs go first, the manifest last."""

    def has_blob(self, sha256: str, size: int) -> bool:
        """Whether a blob is stored with this size."""
        ...

    def put_blob(self, sha256: str, source: Path) -> None:
        """Store a file's bytes under their digest; bytes that do not match it are refused."""
        ...

    def open_blob(self, sha256: str, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        """A blob's bytes from `offset` on, in pieces. Not checked: the reader knows what it asked for."""
        ...

    def create_manifest(self, name: str, version: str, data: bytes) -> bool:
        """Create a release; False, and nothing changed, if there is one."""
        ...

    def read_manifest(self, name: str, version: str) -> bytes | None:
        """A release's manifest, or None."""
        ...

    def names(self) -> list[str]:
        """Names that have releases."""
        ...

    def versions(self, name: str) -> list[str]:
        """Published versions of a name."""
        ...

    def aliases(self, name: str) -> dict[str, str]:
        """Aliases of a name and the versions they point at."""
        ...

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Where an alias points, or None."""
        ...

    def swap_alias(self, name: str, alias: str, version: str, token: str | None) -> bool:
        """Point an alias at `version` if its token is still `token` (None: if it does not exist); False if not."""
        ...


def open_store(url: str) -> Store:
    """The store behind a registry's URL. Touches nothing.

    Raises:
        HostError: a kind that this version does not have.

    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
    if scheme not in STORES:
        what = f"registries of kind {scheme}:// are not supported by this version"
        accepted = ", ".join(f"{known}://..." for known in sorted(STORES))
        raise HostError(what, where=url, fix=f"accepted: a folder, {accepted}")
    module, _, attribute = STORES[scheme].partition(":")
    store: Store = getattr(import_module(module), attribute)(rest)
    return store
