"""Releases of a registry: references to them, find, list, compare, remove unused blobs. Aliases: see `aliases.py`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifact.diff import diff
from pipeline.artifact.manifest import SIGNATURE, FileEntry, Manifest, PairManifest, parse, read
from pipeline.errors import ArtifactError, CorruptError, InputError, RefusedError
from pipeline.registry.parts import Origin, read_whole
from pipeline.registry.promotions import read_promotions
from pipeline.registry.release import all_files, choose, digest_of, parse_document
from pipeline.stores.base import Alias, Removed, Store, UnlistedError, check_exists, open_store
from pipeline.stores.promotions import Promotion


@dataclass(frozen=True)
class Reference:
    """`REGISTRY/NAME@VERSION-or-ALIAS`, taken apart."""

    url: str
    name: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.url}/{self.name}@{self.wanted}"


@dataclass(frozen=True)
class Listed:
    """A release of a registry, with the aliases that point at it.

    `digests`: the content digest of each artifact in it. `has_signature` does not depend on the signer.
    `damage`: why the release cannot be read; then only name, version and aliases are known. `yanked`: why it must not
    be used. `copies`: those that brought it here, the oldest first; `copies_damage`: why they cannot be read.
    """

    name: str
    version: str
    created: str
    size_bytes: int
    aliases: tuple[str, ...]
    variants: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    has_signature: bool = False
    damage: str = ""
    yanked: str = ""
    copies: tuple[Promotion, ...] = ()
    copies_damage: str = ""


def parse_reference(reference: str) -> Reference:
    """Parse a reference; one without `@` means the alias `latest`.

    Raises:
        InputError: it has no registry or no name.

    """
    url, _, last = reference.rpartition("/")
    name, _, wanted = last.partition("@")
    if not (url and name) or url.endswith(":/") or (not wanted and "@" in last):
        fix = "for example artifacts/registry/pico-spec@latest"
        raise InputError(f"found {reference!r}, expected REGISTRY/NAME@VERSION-or-ALIAS", where="reference", fix=fix)
    return Reference(url, name, wanted or "latest")


def find_release(store: Store, name: str, wanted: str, url: str) -> tuple[str, bytes]:
    """Return version and document of a release, by version or alias; a version takes precedence over an alias.

    Raises:
        InputError: no such version or alias; lists those that exist.
        ArtifactError: the alias is damaged.

    """
    version = wanted
    data = store.read_release(name, version) if wanted else None
    if data is None and wanted and (alias := store.read_alias(name, wanted)):
        version = target_of(alias, wanted, f"{url}/{name}")
        data = store.read_release(name, version)
    if data is None:
        known = ", ".join([*store.versions(name), *store.aliases(name)])
        if not known:
            raise no_releases(url, name)
        what = f"{name!r} has no version or alias {wanted!r}"
        raise InputError(what, where=url, fix=f"versions and aliases of {name!r}: {known}")
    return version, data


def check_usable(store: Store, name: str, version: str, where: str, fix: str) -> None:
    """Reject a release that was yanked.

    Raises:
        RefusedError: it was; with the reason.

    """
    if (found := store.read_yank(name, version)) is not None:
        what = f"{name}@{version} was yanked: {found.reason}"
        raise RefusedError(what, where=where, fix=fix)


def has_names(url: str) -> bool:
    """Return whether there is a registry with releases at this address."""
    with contextlib.suppress(InputError, UnlistedError):
        check_exists(url)
        return bool(open_store(url).names())
    return False


def no_releases(url: str, name: str = "") -> InputError:
    """Return the error for an address without releases, or without any of this name: it is most often misspelt."""
    try:
        check_exists(url)
    except InputError as error:
        return error
    try:
        names = open_store(url).names()
    except UnlistedError as error:
        what, fix = f"no release named {name!r}", "check the name: this registry does not list its names"
        return InputError(what, where=url, fix=fix) if name else InputError(error.what, where=url, fix=error.fix)
    if name and names:
        near = difflib.get_close_matches(name, names, 1)
        fix = f"did you mean {near[0]!r}?" if near else f"names: {', '.join(names)}"
        return InputError(f"no release named {name!r}", where=url, fix=fix)
    if name and has_names(inner := f"{url}/{name}"):
        fix = f"add one of: {', '.join(open_store(inner).names())}"
        return InputError("a registry, not a name in it", where=inner, fix=fix)
    return InputError("not a registry: it has no releases", where=url, fix="check the address, or publish a release")


def target_of(alias: Alias, name: str, where: str) -> str:
    """Return the version that an alias points at.

    Raises:
        CorruptError: the alias is damaged.

    """
    if not alias.version:
        raise CorruptError(f"alias {name!r} is damaged", where=where, fix=f"tandem alias set {where}@VERSION {name}")
    return alias.version


def read_small(store: Store, name: str, version: str, path: str, entry: FileEntry) -> bytes:
    """Return a small file of a release, after its digest was checked.

    Raises:
        CorruptError: another digest than the release lists, or a size over the limit for manifests.

    """
    fix = "publish the release again"
    return read_whole(Origin(store, name, version, where=f"{name}@{version}", fix=fix), path, entry)


def list_releases(url: str, name: str | None = None) -> list[Listed]:
    """Return the releases of a registry, or of one name in it, the newest first.

    Raises:
        InputError: the registry is a folder that does not exist.

    """
    check_exists(url)
    store = open_store(url)
    listed = [entry for each in ([name] if name else store.names()) for entry in _releases_of(store, each, url)]
    return sorted(listed, key=lambda entry: entry.created, reverse=True)


def _releases_of(store: Store, name: str, url: str) -> Iterator[Listed]:
    targets = store.aliases(name)
    for version in store.versions(name):
        data = store.read_release(name, version)
        if data is not None:
            aliases = tuple(alias for alias, target in targets.items() if target == version)
            try:
                listed = _listed(store, Release(name, version, data), aliases, f"{url}/{name}@{version}")
                found = store.read_yank(name, version)
                yield replace(listed, yanked=found.reason) if found else listed
            except ArtifactError as error:
                yield Listed(name, version, "", 0, aliases, damage=f"{error.where}: {error.what}")


@dataclass(frozen=True)
class Release:
    """The document of a published release, as its registry has it."""

    name: str
    version: str
    data: bytes


def _listed(store: Store, release: Release, aliases: tuple[str, ...], where: str) -> Listed:
    name, version, document = release.name, release.version, parse_document(release.data, where)
    files = all_files(document, lambda path, entry: read_small(store, name, version, path, entry), name)
    size = sum({entry.sha256: entry.size for entry in files.values()}.values())
    entries = {} if isinstance(document, Manifest) else document.variants
    contents = [entry.content for entry in entries.values()] or [digest_of(document)]
    signatures = store.signatures(name, version, SIGNATURE, hashlib.sha256(release.data).hexdigest())
    copies, damage = _copies(store, release, where)
    return Listed(
        name, version, document.created, size, aliases, tuple(entries),
        tuple(contents), bool(signatures), copies=copies, copies_damage=damage,
    )  # fmt: skip


def _copies(store: Store, release: Release, where: str) -> tuple[tuple[Promotion, ...], str]:
    """Return the copies that brought a release here, or why their record cannot be read: the release is usable."""
    try:
        return read_promotions(store, release.name, release.version, release.data, where), ""
    except CorruptError as error:
        return (), error.what


def collect(url: str, *, dry_run: bool = False) -> Removed:
    """Remove blobs that no release refers to: left by publishes that were killed. Releases and aliases stay.

    Raises:
        InputError: no such folder, or no registry in it.
        ArtifactError: a manifest cannot be read, or names a blob that is not there, or an object among the releases is
            none: nothing is removed, since the blobs of that release are unknown.
        HostError: publishes do not end, or the registry keeps no loose blobs.

    """
    check_exists(url)
    store = open_store(url)

    def reachable(data: bytes) -> set[str]:
        document = parse_document(data, url)
        files = all_files(document, lambda p, e: read_small(store, document.name, document.version, p, e), url)
        return {entry.sha256 for entry in files.values()}

    return store.collect(reachable, dry_run=dry_run)


def manifest_of(reference: str, variant: str | None = None) -> Manifest:
    """Return the manifest of an artifact on disk, or of a release, without pulling the release.

    Raises:
        InputError: neither, or no such variant.

    """
    if (Path(reference) / "manifest.json").is_file():
        return read(Path(reference)).manifest
    ref = parse_reference(reference)
    store = open_store(ref.url)
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    document = parse_document(data, reference)
    if isinstance(document, Manifest):
        return document
    chosen = choose(document, {}, variant or next(iter(document.variants)), reference)
    entry = document.variants[chosen].manifest
    return parse(read_small(store, ref.name, version, f"{chosen}/manifest.json", entry), f"{reference}/{chosen}")


def compare(first: Manifest, second: Manifest) -> dict[str, Any]:
    """Return what differs between two releases: graphs by name and key, fields (shapes, toolchain, gates), files."""
    old, new = _keys(first), _keys(second)
    graphs = {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "recompiled": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }
    return {"graphs": graphs, **diff(first, second)}


def _keys(manifest: Manifest) -> dict[str, str]:
    """Return the cache keys of a pair's graphs, by name; empty for other kinds."""
    return {graph.name: graph.key for graph in manifest.graphs} if isinstance(manifest, PairManifest) else {}
