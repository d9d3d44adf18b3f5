"""Artifact -> immutable release: missing blobs, then the manifest, then aliases. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import Manifest, dump, verify
from pipeline.errors import ArtifactError, GateError, InputError
from pipeline.stores.base import Store, open_store

SWAPS = 8
"""Attempts at moving an alias while others move it too."""


@dataclass(frozen=True)
class Release:
    """What was published, or would be."""

    name: str
    version: str
    url: str
    sent: int
    sent_bytes: int


def publish(root: Path, url: str, aliases: Sequence[str] = (), *, dry_run: bool = False) -> Release:
    """Publish a verified artifact whose gates passed; publishing it again does nothing.

    Raises:
        GateError: it was not validated, or failed.
        ArtifactError: it does not verify, or its version is taken by another content.
    """
    manifest = verify(root).manifest
    if not (manifest.validation or {}).get("passed"):
        state = "failed its gates" if manifest.validation else "was not validated"
        raise GateError(f"{manifest.name} {state}", where=str(root), fix=f"tandem validate {root}")
    store = open_store(url)
    blobs = {entry.sha256: name for name, entry in manifest.files.items()}
    missing = {sha256: name for sha256, name in sorted(blobs.items()) if not store.has_blob(sha256)}
    size = sum(manifest.files[name].size for name in missing.values())
    release = Release(manifest.name, manifest.version, url, len(missing), size)
    if dry_run:
        return release
    for sha256, name in missing.items():
        store.put_blob(sha256, root / name)
    _create(store, manifest, url)
    for alias in aliases:
        _move(store, manifest.name, alias, manifest.version)
    return release


def set_alias(url: str, release: str, alias: str) -> None:
    """Point an alias at a published `name@version`.

    Raises:
        InputError: no such release.
    """
    name, _, version = release.partition("@")
    store = open_store(url)
    if not version or store.get_manifest(name, version) is None:
        known = ", ".join(f"{name}@{v}" for v in store.versions(name)) or "none"
        raise InputError(f"no release {release!r}", where=url, fix=f"published: {known}")
    _move(store, name, alias, version)


def _create(store: Store, manifest: Manifest, url: str) -> None:
    """Create the release. The time of a build is not content: an equal artifact built later is the same release."""
    data = dump(manifest)
    taken = store.put_manifest(manifest.name, manifest.version, data)
    if taken is None or taken == data:
        return
    there = Manifest.model_validate_json(taken)
    graphs = {n: e for n, e in there.files.items() if not n.startswith("reports/") and n != "provenance.json"}
    ours = {n: e for n, e in manifest.files.items() if not n.startswith("reports/") and n != "provenance.json"}
    if graphs != ours:
        raise ArtifactError(
            f"version {manifest.version} is already published with another content",
            where=f"{url}/{manifest.name}",
            fix="a release never changes: publish under a new version",
        )


def _move(store: Store, name: str, alias: str, version: str) -> None:
    for _ in range(SWAPS):
        if store.swap_alias(name, alias, store.get_alias(name, alias), version):
            return
    raise ArtifactError(f"alias {alias!r} is being moved by others", where=name, fix="try again")
