"""Release -> verified artifact directory, from every kind of registry: found, trusted, fetched, linked into place.

Loads and runs nothing. Blobs already here are hard-linked, after they were checked. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact import manifest as artifact
from pipeline.artifact.host import host_facts
from pipeline.artifact.manifest import MANIFEST, SIGNATURE, Manifest
from pipeline.artifact.provenance import PROVENANCE
from pipeline.artifact.verify import check_replaceable
from pipeline.cache.local import default_root
from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.files.atomic import atomic_dir, link_or_copy, write_atomic
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.registry.blobs import Blobs, Origin
from pipeline.registry.release import Document, choose, parse_document
from pipeline.registry.releases import Reference, find_release, parse_reference, read_small
from pipeline.stores.base import Store, open_store

if TYPE_CHECKING:
    from pipeline.artifact.signing import Policy


@dataclass(frozen=True)
class _Signed:
    """A document, and the signatures that there are over it; nothing is known of their worth."""

    data: bytes
    signatures: tuple[bytes, ...]


@dataclass(frozen=True)
class _Found:
    """A release, and one artifact of it. `prefix` is its folder in the release; `index` names its variants, if any."""

    version: str
    prefix: str
    manifest: Manifest
    own: _Signed
    index: _Signed | None


def pull(
    reference: str,
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    only: Sequence[str] | None = None,
    variant: str | None = None,
    policy: Policy | None = None,
    offline: bool = False,
    progress: ByteProgress = no_byte_progress,
) -> Path:
    """Pull a release into `directory` (default `artifacts/pulled/<name>`), complete or not at all; returns it.

    `only` takes the files that match its patterns (`weights/*/rank-0-*`), and what every part comes with; see
    `artifact.part`. Of a release with variants, the one for this host. `policy` says who must
    have signed the artifact, and the index that names its version. `offline` asks nobody: the release must have been
    pulled before.

    Raises:
        InputError: no such release, alias or variant, no file that matches, or `directory` cannot be replaced.
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
    signature = _check_signed(found, policy, str(ref)) if policy else next(iter(found.own.signatures), None)
    origin = Origin(store, ref.name, found.version, found.prefix) if store else None
    if policy is not None:
        policy.check_builder(lambda: _provenance(found.manifest, blobs, origin), str(ref))
    files = artifact.select(found.manifest, artifact.part(found.manifest, only, str(ref)))
    blobs.fetch_all(origin, files, progress)
    with atomic_dir(out) as folder:
        for path, entry in files.items():
            link_or_copy(blobs.path(entry.sha256), folder / path)
        (folder / MANIFEST).write_bytes(found.own.data)
        if signature is not None:
            (folder / SIGNATURE).write_bytes(signature)
    return out


def _check_signed(found: _Found, policy: Policy, where: str) -> bytes:
    """The accepted signature over the artifact's manifest, after that over the index."""
    if found.index is not None:
        if not found.index.signatures:
            what, fix = "the index of this release is not signed", "publish it with --sign, as another version"
            raise ArtifactError(what, where=where, fix=fix)
        policy.check(found.index.data, found.index.signatures, where)
    return policy.check(found.own.data, found.own.signatures, where)


def _find(ref: Reference, store: Store, variant: str | None, blobs: Blobs) -> _Found:
    """Document, manifest and signatures, remembered for a time without network."""
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    document = parse_document(data, str(ref))
    _check_names(document, ref, version)
    prefix, index = "", None
    if isinstance(document, Manifest):
        manifest = document
        if variant is not None:
            raise InputError("this release has no variants", where=str(ref), fix="leave out --variant")
    else:
        chosen = choose(document, host_facts(), variant, str(ref))
        index = _signed(store, ref.name, version, "", data)
        prefix = f"{chosen}/"
        data = read_small(store, ref.name, version, f"{prefix}{MANIFEST}", document.variants[chosen].manifest)
        manifest = artifact.parse(data, str(ref))
        if manifest.name != ref.name:
            raise _mistaken("name", manifest.name, ref.name, ref)
    found = _Found(version, prefix, manifest, _signed(store, ref.name, version, prefix, data), index)
    for wanted in {ref.wanted, version}:
        _remember(_memory(Reference(ref.url, ref.name, wanted), variant, blobs), found)
    return found


def _signed(store: Store, name: str, version: str, prefix: str, data: bytes) -> _Signed:
    digest = hashlib.sha256(data).hexdigest()
    return _Signed(data, tuple(store.signatures(name, version, f"{prefix}{SIGNATURE}", digest)))


def _provenance(manifest: Manifest, blobs: Blobs, origin: Origin | None) -> bytes:
    """The statement that the manifest pins, brought before anything else."""
    entry = manifest.files.get(PROVENANCE)
    if entry is None:
        return b""
    blobs.fetch_all(origin, {PROVENANCE: entry}, no_byte_progress)
    return blobs.path(entry.sha256).read_bytes()


def _check_names(document: Document, ref: Reference, version: str) -> None:
    if document.name != ref.name:
        raise _mistaken("name", document.name, ref.name, ref)
    if document.version != version:
        raise _mistaken("version", document.version, version, ref)


def _mistaken(field: str, found: str, asked: str, ref: Reference) -> ArtifactError:
    what = f"the manifest is of {field} {found!r}, asked was {asked!r}"
    return ArtifactError(what, where=str(ref), fix="publish it again")


def _remember(memory: Path, found: _Found) -> None:
    """In one file, so that after a kill a manifest never lies beside another release's index."""
    documents = [found.own] if found.index is None else [found.own, found.index]
    write_atomic(memory, json.dumps([[_text(one.data), *map(_text, one.signatures)] for one in documents]).encode())


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _recall(ref: Reference, variant: str | None, blobs: Blobs) -> _Found:
    try:
        rows = json.loads(_memory(ref, variant, blobs).read_bytes())
        documents = [_Signed(data, tuple(signatures)) for data, *signatures in (map(b64decode, row) for row in rows)]
        own, *index = documents
    except (FileNotFoundError, ValueError, TypeError) as error:
        what = "this release was never pulled here"
        raise HostError(what, where=str(ref), fix="pull it once with a network") from error
    return _Found(ref.wanted, "", artifact.parse(own.data, str(ref)), own, next(iter(index), None))


def _memory(ref: Reference, variant: str | None, blobs: Blobs) -> Path:
    name = hashlib.sha256(f"{ref} {variant or ''}".encode()).hexdigest()
    return blobs.root / "manifests" / f"{name}.json"
