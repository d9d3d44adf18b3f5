"""Looking after a registry: find, list, compare releases; move, follow and roll back aliases; collect the unused."""

from __future__ import annotations

import getpass
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact.diff import diff
from pipeline.artifact.manifest import FileEntry, Manifest, PairManifest, parse, read
from pipeline.errors import ArtifactError, InputError
from pipeline.registry.release import Document, all_files, choose, parse_document
from pipeline.stores.base import SMALL_BYTES, Alias, Blob, Move, Removed, Store, open_store

SWAPS = 8
"""Attempts at moving an alias while others move it, too."""


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
    """A release of a registry, with the aliases that point at it."""

    name: str
    version: str
    created: str
    size_bytes: int
    aliases: tuple[str, ...]
    variants: tuple[str, ...] = ()


def parse_reference(reference: str) -> Reference:
    """Take a reference apart; without `@`, it means the alias `latest`.

    Raises:
        InputError: it has no registry or no name.

    """
    url, _, last = reference.rpartition("/")
    name, _, wanted = last.partition("@")
    if not (url and name) or url.endswith(":/") or (not wanted and "@" in last):
        fix = "for example artifacts/registry/pico-spec@latest"
        raise InputError(f"{reference!r} is not REGISTRY/NAME@VERSION", where="reference", fix=fix)
    return Reference(url, name, wanted or "latest")


def find_release(store: Store, name: str, wanted: str, url: str) -> tuple[str, bytes]:
    """Version and document of a release, by version or alias. A version never yields to an alias.

    Raises:
        InputError: neither; names what is published.
        ArtifactError: a damaged alias.

    """
    version = wanted
    data = store.read_release(name, version) if wanted else None
    if data is None and wanted and (alias := store.read_alias(name, wanted)):
        version = _points_at(alias, wanted, f"{url}/{name}")
        data = store.read_release(name, version)
    if data is None:
        known = ", ".join([*store.versions(name), *store.aliases(name)]) or "nothing"
        what = f"no version or alias {wanted!r} of {name!r}"
        raise InputError(what, where=url, fix=f"published here under {name!r}: {known}")
    return version, data


def _points_at(alias: Alias, name: str, where: str) -> str:
    if not alias.version:
        raise ArtifactError(f"alias {name!r} is damaged", where=where, fix=f"tandem alias set {where}@VERSION {name}")
    return alias.version


def read_small(store: Store, name: str, version: str, path: str, entry: FileEntry) -> bytes:
    """A small file of a release, checked.

    Raises:
        ArtifactError: not what the release lists, or larger than any manifest.

    """
    where = f"{name}@{version}: {path}"
    if entry.size > SMALL_BYTES:
        raise ArtifactError(f"{entry.size:,} bytes is no manifest", where=where, fix="do not use this release")
    buffer = memoryview(bytearray(entry.size))
    data = bytes(buffer[: store.read_blob(Blob(name, version, path, entry.sha256, entry.size), 0, buffer)])
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        what = f"sha256 {found}, should be {entry.sha256}"
        raise ArtifactError(what, where=where, fix="publish the release again")
    return data


def list_releases(url: str, name: str | None = None) -> list[Listed]:
    """Releases of a registry, the newest first."""
    store, found = open_store(url), []
    for one in [name] if name else store.names():
        pointers = store.aliases(one)
        for version in store.versions(one):
            data = store.read_release(one, version)
            if data is not None:
                aliases = tuple(alias for alias, points_at in pointers.items() if points_at == version)
                found.append(_listed(store, one, version, parse_document(data, f"{url}/{one}@{version}"), aliases))
    return sorted(found, key=lambda listed: listed.created, reverse=True)


def _listed(store: Store, name: str, version: str, document: Document, aliases: tuple[str, ...]) -> Listed:
    files = all_files(document, lambda path, entry: read_small(store, name, version, path, entry), name)
    size = sum({entry.sha256: entry.size for entry in files.values()}.values())
    variants = () if isinstance(document, Manifest) else tuple(document.variants)
    return Listed(name, version, document.created, size, aliases, variants)


def set_alias(url: str, release: str, alias: str) -> None:
    """Point an alias at a published `name@version`, or at what another alias of the name points at.

    Raises:
        InputError: no such release, or the alias is named like one.

    """
    name, _, wanted = release.partition("@")
    store = open_store(url)
    version, _ = find_release(store, name, wanted, url)
    check_alias(store, name, version, alias, url)
    with store.publishing():
        move_alias(store, name, alias, version, url)


def check_alias(store: Store, name: str, version: str, alias: str, url: str) -> None:
    """An alias named like a version could never be reached.

    Raises:
        InputError: it is.

    """
    if alias == version or store.read_release(name, alias) is not None:
        raise InputError(f"alias {alias!r} is a version of {name}", where=url, fix="choose another name")


def move_alias(store: Store, name: str, alias: str, version: str, url: str) -> None:
    """Point an alias at a version, whoever else moves it; no move is lost.

    Raises:
        ArtifactError: others move it all the time.

    """
    for _ in range(SWAPS):
        now = store.read_alias(name, alias)
        if now is not None and now.version == version:
            return
        if store.swap_alias(name, alias, this_move(version), now):
            return
    raise ArtifactError(f"alias {alias!r} is being moved by others", where=f"{url}/{name}", fix="try again")


def history(url: str, name: str, alias: str) -> Alias:
    """Where an alias points, and its moves, the newest first.

    Raises:
        InputError: there is none; names what there is.
        ArtifactError: it is damaged.

    """
    store = open_store(url)
    found = store.read_alias(name, alias)
    if found is None:
        known = ", ".join(store.aliases(name)) or "none"
        raise InputError(f"no alias {alias!r} of {name!r}", where=url, fix=f"aliases here: {known}")
    _points_at(found, alias, f"{url}/{name}")
    return found


def roll_back(url: str, name: str, alias: str) -> tuple[str, str]:
    """Point an alias back at the release before this one: versions from and to. Twice goes two releases back.

    Raises:
        InputError: there was none before, or it is gone.
        ArtifactError: somebody moved the alias just now.

    """
    now = history(url, name, alias)
    before = _before(now)
    store = open_store(url)
    if before is None or store.read_release(name, before) is None:
        what = f"{alias!r} has pointed at {now.version} only" if before is None else f"{before} is not published"
        raise InputError(what, where=f"{url}/{name}", fix=f"tandem alias set {url}/{name}@VERSION {alias}")
    with store.publishing():
        if not store.swap_alias(name, alias, this_move(before), now):
            raise ArtifactError(f"alias {alias!r} was moved just now", where=f"{url}/{name}", fix="look, and try again")
    return now.version, before


def _before(now: Alias) -> str | None:
    """The release before the one that an alias points at; rollbacks undo moves, as in a stack."""
    stack: list[str] = []
    for move in reversed(now.moves):
        if len(stack) > 1 and stack[-2] == move.version:
            stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack[-2] if len(stack) > 1 else None


def collect(url: str, *, dry_run: bool = False) -> Removed:
    """Remove blobs that no release reaches: left by publishes that were killed. Releases and aliases stay.

    Raises:
        ArtifactError: a manifest cannot be read: nothing is removed, since what it reaches is not known.
        HostError: somebody publishes all the time, or the registry keeps no loose blobs.

    """
    store = open_store(url)

    def reachable(data: bytes) -> set[str]:
        document = parse_document(data, url)
        files = all_files(document, lambda p, e: read_small(store, document.name, document.version, p, e), url)
        return {entry.sha256 for entry in files.values()}

    return store.collect(reachable, dry_run=dry_run)


def manifest_of(reference: str, variant: str | None = None) -> Manifest:
    """The manifest of an artifact on disk, or of a release, which is not pulled for it.

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
    """What differs between two releases: graphs by name and key, fields (shapes, toolchain, gates), files."""
    a, b = (_keys(one) for one in (first, second))
    graphs = {
        "added": sorted(b.keys() - a.keys()),
        "removed": sorted(a.keys() - b.keys()),
        "recompiled": sorted(name for name in a.keys() & b.keys() if a[name] != b[name]),
    }
    return {"graphs": graphs, **diff(first, second)}


def _keys(manifest: Manifest) -> dict[str, str]:
    """Cache keys of a pair's graphs, by name."""
    return {graph.name: graph.key for graph in manifest.graphs} if isinstance(manifest, PairManifest) else {}


def this_move(version: str) -> Move:
    """A move of now, by whoever runs this."""
    who = os.environ.get("GITHUB_ACTOR") or os.environ.get("USER") or _user()
    return Move(version, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "".join(c for c in who if c.isprintable()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
