"""What a registry store is: blobs by sha256, release manifests that are created once, aliases that are compared and swapped."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from pipeline.errors import HostError

STORES: dict[str, str] = {"file": "pipeline.stores.folder:FolderStore"}
"""Scheme of a registry's URL -> its store. A URL without a scheme is a folder."""


class Store(Protocol):
    """One registry. Readers see a whole release or none: blobs go first, the manifest last."""

    def has_blob(self, sha256: str) -> bool:
        """Whether a blob is stored."""
        ...

    def put_blob(self, sha256: str, source: Path) -> None:
        """Store a file's bytes under their digest; a digest that does not match is refused."""
        ...

    def get_blob(self, sha256: str, target: Path) -> None:
        """Write a blob to `target`, checked while it is read."""
        ...

    def put_manifest(self, name: str, version: str, data: bytes) -> bytes | None:
        """Create a release; returns None, or, where the version exists already, its bytes."""
        ...

    def get_manifest(self, name: str, version: str) -> bytes | None:
        """A release's manifest, or None."""
        ...

    def versions(self, name: str) -> list[str]:
        """Published versions of a name."""
        ...

    def get_alias(self, name: str, alias: str) -> str | None:
        """The version an alias points at, or None."""
        ...

    def swap_alias(self, name: str, alias: str, old: str | None, new: str) -> bool:
        """Point an alias at `new` if it still points at `old`; False if it does not."""
        ...


def open_store(url: str) -> Store:
    """The store behind a registry's URL.

    Raises:
        HostError: a kind that this version does not have.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
    if scheme not in STORES:
        raise HostError(
            f"registries of kind {scheme}:// are not part of this version", where=url, fix="use a folder as registry"
        )
    module, _, attribute = STORES[scheme].partition(":")
    store: Store = getattr(import_module(module), attribute)(Path(rest))
    return store
