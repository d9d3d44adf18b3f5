"""Artifact -> immutable release: missing blobs, then the manifest, then aliases. Imports no torch.

Deletes nothing: a publish that is killed leaves blobs without a release, which the next one uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import Manifest, Progress, content_digest, diff, dump, parse, silent, verify
from pipeline.errors import ArtifactError, GateError, InputError
from pipeline.stores.base import Store, open_store

SWAPS = 8
"""Attempts at moving an alias while others move it, too."""


@dataclass(frozen=True)
class Release:
    """What was published, or would be. `fresh` is False when the registry had it already."""

    name: str
    version: str
    url: str
    sent: int
    sent_bytes: int
    fresh: bool
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Listed:
    """A release of a registry, with the aliases that point at it."""

    name: str
    version: str
    created: str
    size_bytes: int
    aliases: tuple[str, ...]


def publish(
    root: Path, url: str, aliases: Sequence[str] = (), *, dry_run: bool = False, progress: Progress = silent
) -> Release:  # fmt: skip
    """Publish a verified artifact whose gates passed; publishing it again sends nothing.

    An equal artifact that was built or validated at another time is the same release: the published one stays.

    Raises:
        GateError: it was not validated, or failed.
        ArtifactError: it does not verify, or its version is taken by another content.
        HostError: the registry cannot be reached or written.

    """
    manifest = verify(root).manifest
    _check_gates(manifest, root)
    store = open_store(url)
    _check_aliases(store, manifest, aliases, url)
    there = _published(store, manifest, url)
    missing = _missing(store, manifest, there)
    size = sum(manifest.files[name].size for name in missing.values())
    release = Release(manifest.name, manifest.version, url, len(missing), size, there is None, tuple(aliases))
    if dry_run:
        return release
    _send(store, manifest, root, missing, progress)
    if there is None and not store.create_manifest(manifest.name, manifest.version, dump(manifest)):
        _published(store, manifest, url)  # somebody else was faster: with the same content, or this raises
    for alias in aliases:
        _move(store, manifest.name, alias, manifest.version, url)
    return release


def set_alias(url: str, release: str, alias: str) -> None:
    """Point an alias at a published `name@version`, or at what another alias of the name points at.

    Raises:
        InputError: no such release, or the alias is named like one.

    """
    name, _, wanted = release.partition("@")
    store = open_store(url)
    version, data = find_release(store, name, wanted, url)
    manifest = parse(data, f"{url}/{name}@{version}")
    _check_aliases(store, manifest, [alias], url)
    _move(store, name, alias, version, url)


def list_releases(url: str, name: str | None = None) -> list[Listed]:
    """Releases of a registry, the newest first."""
    store, found = open_store(url), []
    for one in [name] if name else store.names():
        pointers = store.aliases(one)
        for version in store.versions(one):
            data = store.read_manifest(one, version)
            if data is not None:
                manifest = parse(data, f"{url}/{one}@{version}")
                aliases = tuple(alias for alias, points_at in pointers.items() if points_at == version)
                found.append(Listed(one, version, manifest.created, manifest.size_bytes, aliases))
    return sorted(found, key=lambda listed: listed.created, reverse=True)


def find_release(store: Store, name: str, wanted: str, url: str) -> tuple[str, bytes]:
    """Version and manifest of a release, by version or alias. A version never yields to an alias.

    Raises:
        InputError: neither; names what is published.

    """
    version = wanted
    data = store.read_manifest(name, version) if wanted else None
    if data is None and wanted and (alias := store.read_alias(name, wanted)):
        version = alias.version
        data = store.read_manifest(name, version)
    if data is None:
        known = ", ".join([*store.versions(name), *store.aliases(name)]) or "nothing"
        what = f"no version or alias {wanted!r} of {name!r}"
        raise InputError(what, where=url, fix=f"published here under {name!r}: {known}")
    return version, data


def _check_gates(manifest: Manifest, root: Path) -> None:
    if manifest.passed is not True:
        state = "was not validated" if manifest.passed is None else "failed its gates"
        raise GateError(f"{manifest.name} {state}", where=str(root), fix=f"tandem validate {root}")


def _check_aliases(store: Store, manifest: Manifest, aliases: Sequence[str], url: str) -> None:
    """An alias named like a version could never be reached."""
    for alias in aliases:
        if alias == manifest.version or store.read_manifest(manifest.name, alias) is not None:
            raise InputError(f"alias {alias!r} is a version of {manifest.name}", where=url, fix="choose another name")


def _published(store: Store, manifest: Manifest, url: str) -> Manifest | None:
    """The same release, if it is there.

    Raises:
        ArtifactError: its version is taken by another content.

    """
    data = store.read_manifest(manifest.name, manifest.version)
    if data is None:
        return None
    where = f"{url}/{manifest.name}@{manifest.version}"
    there = parse(data, where)
    ours, theirs = content_digest(manifest), content_digest(there)
    if ours == theirs:
        return there
    changed = [
        *diff(there, manifest)["fields"],
        *(n for n in manifest.files if manifest.files[n] != there.files.get(n)),
    ]
    what = f"this version is published with digest {theirs}, yours is {ours}; {', '.join(changed[:5])} differ"
    raise ArtifactError(what, where=where, fix="a release never changes: publish under another version")


def _missing(store: Store, manifest: Manifest, there: Manifest | None) -> dict[str, str]:
    """sha256 -> a file with it, of the blobs that the registry lacks, small ones first.

    Of a release that is `there` already, only what it lists: blobs that were lost are sent again.
    """
    files = {n: e for n, e in manifest.files.items() if there is None or there.files.get(n) == e}
    blobs = {entry.sha256: (entry.size, name) for name, entry in files.items()}
    order = sorted(blobs, key=lambda sha256: blobs[sha256])
    return {sha256: blobs[sha256][1] for sha256 in order if not store.has_blob(sha256, blobs[sha256][0])}


def _send(store: Store, manifest: Manifest, root: Path, missing: dict[str, str], progress: Progress) -> None:
    total, done = sum(manifest.files[name].size for name in missing.values()), 0
    for sha256, name in missing.items():
        store.put_blob(sha256, root / name)
        done += manifest.files[name].size
        progress(done, total)


def _move(store: Store, name: str, alias: str, version: str, url: str) -> None:
    for _ in range(SWAPS):
        now = store.read_alias(name, alias)
        if now is not None and now.version == version:
            return
        if store.swap_alias(name, alias, version, now.token if now else None):
            return
    raise ArtifactError(f"alias {alias!r} is being moved by others", where=f"{url}/{name}", fix="try again")
