"""Release -> verified artifact directory, from every kind of registry: found, trusted, fetched, linked into place.

Loads and runs nothing. Blobs already here are hard-linked, after they were checked. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifact
from pipeline.artifact import MANIFEST, SIGNATURE, Manifest, Progress, check_replaceable, silent
from pipeline.blobs import Blobs, Origin
from pipeline.cache import default_root
from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.files import atomic_dir, link_or_copy, write_atomic
from pipeline.host import host_facts
from pipeline.provenance import PROVENANCE
from pipeline.registry import Reference, find_release, parse_reference, read_small
from pipeline.release import Document, choose, parse_document
from pipeline.stores.base import Store, open_store

if TYPE_CHECKING:
    from pipeline.signing import Policy


@dataclass(frozen=True)
class _Found:
    """A release, and one artifact of it. `prefix` is its folder in the release; `signature` is empty if it has none."""

    version: str
    prefix: str
    data: bytes
    manifest: Manifest
    signatures: tuple[bytes, ...]


def pull(
    reference: str,
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    only: Sequence[str] | None = None,
    variant: str | None = None,
    policy: Policy | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Path:
    """Pull a release into `directory` (default `artifacts/pulled/<name>`), complete or not at all; returns it.

    `only` takes the files that match its patterns (`weights/*/rank-0-*`), a part that `artifact.verify(..., only=...)`
    checks. Of a release with variants, the one for this host. `policy` says whose signature is needed. `offline` asks
    nobody: the release must have been pulled before.

    Raises:
        InputError: no such release, alias or variant, or `directory` holds something else than an artifact.
        ArtifactError: a blob that does not match its digest, an unsafe path, a manifest of another release, or not
            signed as `policy` demands: then nothing was fetched.
        HostError: no space, a registry that cannot be reached, or, offline, what was never pulled.

    """  # fmt: skip
    ref = parse_reference(reference)
    out = directory or Path("artifacts/pulled") / ref.name
    check_replaceable(out)
    blobs = Blobs((cache or default_root()) / "blobs")
    store = None if offline else open_store(ref.url)
    found = _recall(ref, variant, blobs) if store is None else _find(ref, store, variant, blobs)
    signature = policy.check(found.data, found.signatures, str(ref)) if policy else next(iter(found.signatures), None)
    origin = Origin(store, ref.name, found.version, found.prefix) if store else None
    if policy is not None:
        policy.check_builder(lambda: _provenance(found.manifest, blobs, origin), str(ref))
    files = artifact.select(found.manifest, only)
    if not files:
        raise InputError(f"no file matches {', '.join(only or ())}", where=str(ref), fix="see `tandem inspect`")
    blobs.bring(origin, files, progress)
    with atomic_dir(out) as folder:
        for path, entry in files.items():
            link_or_copy(blobs.path(entry.sha256), folder / path)
        (folder / MANIFEST).write_bytes(found.data)
        if signature is not None:
            (folder / SIGNATURE).write_bytes(signature)
    return out


def _find(ref: Reference, store: Store, variant: str | None, blobs: Blobs) -> _Found:
    """Document, manifest and signatures, remembered for a time without network."""
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    document = parse_document(data, str(ref))
    _check_names(document, ref, version)
    prefix = ""
    if isinstance(document, Manifest):
        manifest = document
        if variant is not None:
            raise InputError("this release has no variants", where=str(ref), fix="leave out --variant")
    else:
        chosen = choose(document, host_facts(), variant, str(ref))
        prefix = f"{chosen}/"
        data = read_small(store, ref.name, version, f"{prefix}{MANIFEST}", document.variants[chosen].manifest)
        manifest = artifact.parse(data, str(ref))
        if manifest.name != ref.name:
            raise _mistaken("name", manifest.name, ref.name, ref)
    digest = hashlib.sha256(data).hexdigest()
    signatures = tuple(store.signatures(ref.name, version, f"{prefix}{SIGNATURE}", digest))
    for wanted in {ref.wanted, version}:
        _remember(Reference(ref.url, ref.name, wanted), variant, blobs, data, signatures)
    return _Found(version, prefix, data, manifest, signatures)


def _provenance(manifest: Manifest, blobs: Blobs, origin: Origin | None) -> bytes:
    """The statement that the manifest pins, brought before anything else."""
    entry = manifest.files.get(PROVENANCE)
    if entry is None:
        return b""
    blobs.bring(origin, {PROVENANCE: entry}, silent)
    return blobs.path(entry.sha256).read_bytes()


def _check_names(document: Document, ref: Reference, version: str) -> None:
    if document.name != ref.name:
        raise _mistaken("name", document.name, ref.name, ref)
    if document.version != version:
        raise _mistaken("version", document.version, version, ref)


def _mistaken(field: str, found: str, asked: str, ref: Reference) -> ArtifactError:
    what = f"the manifest is of {field} {found!r}, asked was {asked!r}"
    return ArtifactError(what, where=str(ref), fix="publish it again")


def _remember(ref: Reference, variant: str | None, blobs: Blobs, data: bytes, signatures: tuple[bytes, ...]) -> None:
    place = _memory(ref, variant, blobs)
    write_atomic(place, data)
    for one in signatures[:1]:
        write_atomic(place.with_suffix(".signature"), one)


def _recall(ref: Reference, variant: str | None, blobs: Blobs) -> _Found:
    place = _memory(ref, variant, blobs)
    try:
        data = place.read_bytes()
    except FileNotFoundError as error:
        what = "this release was never pulled here"
        raise HostError(what, where=str(ref), fix="pull it once with a network") from error
    signature = place.with_suffix(".signature")
    signatures = (signature.read_bytes(),) if signature.is_file() else ()
    return _Found(ref.wanted, "", data, artifact.parse(data, str(ref)), signatures)


def _memory(ref: Reference, variant: str | None, blobs: Blobs) -> Path:
    name = hashlib.sha256(f"{ref} {variant or ''}".encode()).hexdigest()
    return blobs.root / "manifests" / f"{name}.json"
