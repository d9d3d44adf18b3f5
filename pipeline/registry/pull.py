"""Release -> verified artifact directory, from every kind of registry: resolve, check signatures, fetch, hard-link.

Loads and runs nothing. Blobs in the local store are checked before they are linked. Imports no torch.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifact import manifest as artifact
from pipeline.artifact.host import host_facts
from pipeline.artifact.manifest import MANIFEST, PULLED, SIGNATURE, FileEntry, Manifest
from pipeline.artifact.provenance import PROVENANCE
from pipeline.artifact.pulled import Promoted, PullRecord
from pipeline.artifact.signing import Accepted, Policy, absolute
from pipeline.artifact.verify import check_replaceable
from pipeline.cache.local import default_root
from pipeline.errors import ArtifactError, CorruptError, HostError, InputError, no_string
from pipeline.extras import require
from pipeline.files.atomic import atomic_dir, link_or_copy, write_atomic
from pipeline.files.limits import MAX_BYTES
from pipeline.files.unfinished import sweep_once
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.records import Record
from pipeline.registry.blobs import Blobs
from pipeline.registry.documents import SignedDocument, check_names, check_signatures, mismatch, signed_document
from pipeline.registry.parts import Origin
from pipeline.registry.promotions import read_promotions
from pipeline.registry.release import choose, parse_document
from pipeline.registry.releases import Reference, check_usable, find_release, parse_reference, read_small
from pipeline.stores.base import Store, extras_of, open_store
from pipeline.stores.promotions import Promotion


@dataclass(frozen=True)
class Selection:
    """The part of a release to pull: files that match one of the patterns `only`, of one variant.

    `yanked`: also of a release that was yanked.
    """

    only: Sequence[str] | None = None
    variant: str | None = None
    yanked: bool = False

    def __post_init__(self) -> None:
        no_string(self.only, "only", "patterns")


EVERYTHING = Selection()


@dataclass(frozen=True)
class Pulled:
    """A pulled release: the folder of its artifact, its facts, and its signer (None: no signer was required).

    `version` is the release's, `digest` the artifact's content digest, `created` the time of its build (UTC).
    """

    path: Path
    name: str
    version: str
    digest: str
    files: int
    size_bytes: int
    signer: str | None = None
    has_signature: bool = False
    created: str = ""


class _Remembered(Record):
    """The documents of a release as an earlier pull stored them, for `offline`."""

    own: SignedDocument
    index: SignedDocument | None = None
    promotions: tuple[Promotion, ...] = ()


@dataclass(frozen=True)
class _Resolved:
    """A release, and one artifact of it. `prefix` is its folder in the release; `index` lists the variants, if any.

    `accepted` is the signature over the manifest that the policy accepts; None without a policy.
    """

    version: str
    prefix: str
    manifest: Manifest
    own: SignedDocument
    index: SignedDocument | None
    accepted: Accepted | None
    promotions: tuple[Promotion, ...] = ()


@dataclass(frozen=True)
class _Wanted:
    """The release and variant to find, and the policy that its documents must satisfy before they are parsed."""

    ref: Reference
    variant: str | None
    policy: Policy | None
    yanked: bool = False

    def checked(self, signed: SignedDocument) -> Accepted | None:
        """Check the signatures over a document, whose bytes are all that is read.

        Raises:
            RefusedError: no signature, or none that the policy accepts.

        """
        return check_signatures(self.policy, signed, str(self.ref))


def pull(
    reference: str,
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    select: Selection = EVERYTHING,
    policy: Policy | None = None,
    offline: bool = False,
    progress: ByteProgress = no_byte_progress,
) -> Path:
    """Pull a release into `directory` (default `artifacts/pulled/<name>`), complete or not at all; return it.

    `select.only` limits the files (`weights/*/rank-0-*`); files that every part needs, as the tokenizer, are added.
    Without `select.variant`, the variant for this host is pulled. `policy` has the required signers of the artifact and
    of the index that names its version. `offline` uses only the local cache: an earlier pull must have filled it. An
    exact version that an earlier pull stored is not asked for again: a release never changes.

    Raises:
        InputError: no such release, alias or variant, no matching file, or `directory` cannot be replaced.
        RefusedError: a missing signature that `policy` demands, or a release that was yanked: nothing was fetched.
        CorruptError: a blob that does not match its digest, an unsafe path, or a manifest of another release.
        HostError: packages of an extra that are not installed, no space, a registry that cannot be reached, or,
            offline, a release that was never pulled.

    """
    return pull_release(
        reference, directory, cache=cache, select=select, policy=policy, offline=offline, progress=progress
    ).path


def pull_release(
    reference: str,
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    select: Selection = EVERYTHING,
    policy: Policy | None = None,
    offline: bool = False,
    progress: ByteProgress = no_byte_progress,
) -> Pulled:
    """Pull a release into `directory` (default `artifacts/pulled/<name>`), complete or not at all; return its facts.

    Parameters and errors are those of `pull`.
    """
    ref = parse_reference(reference)
    out = directory or Path("artifacts/pulled") / ref.name
    check_replaceable(out)
    require([*(() if offline else extras_of(ref.url)), *(("sign",) if policy else ())], str(ref))
    blobs = Blobs((cache or default_root()) / "blobs")
    wanted = _Wanted(ref, select.variant, policy, yanked=select.yanked)
    known = None if offline else _known(wanted, select, blobs, progress)
    if known is not None:
        return _pulled(_Pull(ref, out, select, policy, blobs, known, is_fetched=True), progress)
    store = None if offline else open_store(ref.url)
    release = _recall(wanted, blobs) if store is None else _resolve(wanted, store, blobs)
    origin = Origin(store, ref.name, release.version, release.prefix) if store else None
    return _pulled(_Pull(ref, out, select, policy, blobs, release, origin), progress)


@dataclass(frozen=True)
class _Pull:
    """One pull of a resolved release; without an origin, from the local cache. `is_fetched`: its blobs are checked."""

    ref: Reference
    out: Path
    select: Selection
    policy: Policy | None
    blobs: Blobs
    release: _Resolved
    origin: Origin | None = None
    is_fetched: bool = False


def _pulled(of: _Pull, progress: ByteProgress) -> Pulled:
    release, where, accepted = of.release, str(of.ref), of.release.accepted
    signature = accepted.signature if accepted else next(iter(release.own.signatures), None)
    if of.policy is not None:
        of.policy.check_builder(lambda: _provenance(release.manifest, of.blobs, of.origin), where)
    files = artifact.select(release.manifest, artifact.part(release.manifest, of.select.only, where))
    if not of.is_fetched:
        of.blobs.fetch_all(of.origin, files, progress)
    documents = {MANIFEST: release.own.data, PULLED: _record(of)}
    documents |= {} if signature is None else {SIGNATURE: signature}
    sweep_once(of.out.parent)  # a pull that ended after the exchange left the earlier release, which may be large
    if not _is_there(of, files, documents):
        with atomic_dir(of.out) as folder:
            for path, entry in files.items():
                link_or_copy(of.blobs.path(entry.sha256), folder / path)
            for name, data in documents.items():
                (folder / name).write_bytes(data)
    return Pulled(
        of.out, of.ref.name, release.version, artifact.content_digest(release.manifest), len(files),
        sum(entry.size for entry in files.values()), str(accepted.signer) if accepted else None, signature is not None,
        release.manifest.created,
    )  # fmt: skip


def _record(of: _Pull) -> bytes:
    """Return the record of this pull, by which policies on disk select their rule and checks know the part."""
    sha256 = hashlib.sha256(of.release.own.data).hexdigest()
    signer = str(of.release.accepted.signer) if of.release.accepted else None
    reference = absolute(str(of.ref))
    only = tuple(of.select.only) if of.select.only else None
    promotions = tuple(Promoted(**asdict(each)) for each in of.release.promotions)
    return PullRecord(
        reference=reference, version=of.release.version, manifest_sha256=sha256, signer=signer, only=only,
        promotions=promotions,
    ).dump()  # fmt: skip


def _known(wanted: _Wanted, select: Selection, blobs: Blobs, progress: ByteProgress) -> _Resolved | None:
    """Return a release that an earlier pull of this exact version stored, whole: it never changes."""
    try:
        release = _recall(wanted, blobs)
        if release.version != wanted.ref.wanted:
            return None
        files = artifact.select(release.manifest, artifact.part(release.manifest, select.only, str(wanted.ref)))
        blobs.fetch_all(None, files, progress)
    except (ArtifactError, HostError, InputError):  # the registry has what is missing or damaged here
        return None
    return release


def _is_there(of: _Pull, files: Mapping[str, FileEntry], documents: Mapping[str, bytes]) -> bool:
    """Return whether the destination is this pull's result already: links of the checked blobs, and nothing else."""
    try:
        if any((of.out / name).read_bytes() != data for name, data in documents.items()):
            return False
        if any(not (of.out / path).samefile(of.blobs.path(entry.sha256)) for path, entry in files.items()):
            return False
        found = {path.relative_to(of.out).as_posix() for path in of.out.rglob("*") if not path.is_dir()}
    except OSError:
        return False
    return found == {*files, *documents}


def _resolve(wanted: _Wanted, store: Store, blobs: Blobs) -> _Resolved:
    """Return document, manifest and signatures, checked before they are parsed; store them for offline pulls."""
    ref, variant = wanted.ref, wanted.variant
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    if not wanted.yanked:
        fix = f"use another version, or the folder of: tandem pull {shlex.quote(str(ref))} --allow-yanked"
        check_usable(store, ref.name, version, str(ref), fix)
    own, index, prefix = signed_document(store, ref.name, version, "", data), None, ""
    accepted = wanted.checked(own)
    document = parse_document(data, str(ref))
    check_names(document, ref, version)
    promotions = _promotions(store, ref, version, data)
    if isinstance(document, Manifest):
        manifest = document
        if variant is not None:
            raise InputError("this release has no variants", where=str(ref), fix="omit --variant")
    else:
        chosen = choose(document, host_facts(), variant, str(ref))
        index, prefix = own, f"{chosen}/"
        data = read_small(store, ref.name, version, f"{prefix}{MANIFEST}", document.variants[chosen].manifest)
        own = signed_document(store, ref.name, version, prefix, data)
        accepted = wanted.checked(own)
        manifest = artifact.parse(data, str(ref))
        if manifest.name != ref.name:
            raise mismatch("name", ref.name, manifest.name, ref)
    release = _Resolved(version, prefix, manifest, own, index, accepted, promotions)
    for name in {ref.wanted, version}:
        _remember(_memory(Reference(ref.url, ref.name, name), variant, blobs), release)
    return release


def _promotions(store: Store, ref: Reference, version: str, document: bytes) -> tuple[Promotion, ...]:
    """Return the copies that brought a release here; none of a damaged record, which `tandem ls` shows."""
    try:
        return read_promotions(store, ref.name, version, document, str(ref))
    except CorruptError:
        return ()


def _provenance(manifest: Manifest, blobs: Blobs, origin: Origin | None) -> bytes:
    """Return the statement that the manifest pins; it is fetched before all other files."""
    entry = manifest.files.get(PROVENANCE)
    if entry is None or entry.size > MAX_BYTES:
        return b""
    blobs.fetch_all(origin, {PROVENANCE: entry}, no_byte_progress)
    return blobs.path(entry.sha256).read_bytes()


def _remember(memory: Path, release: _Resolved) -> None:
    """Write one file, so that after a kill a manifest never lies beside another release's index."""
    remembered = _Remembered(own=release.own, index=release.index, promotions=release.promotions)
    write_atomic(memory, remembered.model_dump_json().encode())


def _recall(wanted: _Wanted, blobs: Blobs) -> _Resolved:
    ref = wanted.ref
    try:
        documents = _Remembered.model_validate_json(_memory(ref, wanted.variant, blobs).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        what = "this release is not in the local cache"
        raise HostError(what, where=str(ref), fix="pull it once without --offline") from error
    index = documents.index
    if index is not None:
        wanted.checked(index)
    accepted = wanted.checked(documents.own)
    manifest = artifact.parse(documents.own.data, str(ref))
    version = parse_document(index.data, str(ref)).version if index else manifest.version
    return _Resolved(version, "", manifest, documents.own, index, accepted, documents.promotions)


def _memory(ref: Reference, variant: str | None, blobs: Blobs) -> Path:
    name = hashlib.sha256(f"{ref} {variant or ''}".encode()).hexdigest()
    return blobs.root / "manifests" / f"{name}.json"
