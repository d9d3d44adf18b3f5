"""Copy a release from one store to another: checked, then the missing blobs, then the document, then aliases.

Bytes go from store to store through memory, in parts. Manifests, indexes and signatures stay as they are, so digests
stay, too. Deletes nothing: a copy that is killed leaves blobs without a release, which the next copy uses.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.artifact.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest, parse
from pipeline.artifact.provenance import PROVENANCE, builder, invocation
from pipeline.artifact.signing import Policy, absolute
from pipeline.errors import ArtifactError, InputError, RefusedError, no_string
from pipeline.extras import require
from pipeline.files.limits import MAX_BYTES
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.registry.aliases import check_alias, move_alias, this_move
from pipeline.registry.card import card
from pipeline.registry.documents import SignedDocument, check_names, check_signatures, mismatch, signed_document
from pipeline.registry.parts import BlobSource, Origin, Reading, read_whole
from pipeline.registry.promotions import read_promotions, unrecorded
from pipeline.registry.publish import LOCK, Place, check_version, send_missing
from pipeline.registry.release import Document, digest_of, parse_document
from pipeline.registry.releases import Reference, check_usable, find_release, parse_reference
from pipeline.stores.base import Content, Signature, Store, Yank, check_spelling, extras_of, open_store
from pipeline.stores.promotions import MAX_TEXT, PROMOTED, Promotion, promotion_text
from pipeline.stores.sources import Source

READERS = 16
ANOTHER = "a release never changes: publish another version with --version, and copy that one"


@dataclass(frozen=True)
class CopySettings:
    """Settings of `copy`.

    `policy`: the required signers, by the release's references at the destination. `yanked`: also copy a release that
    was yanked, with its yank. `dry_run`: send nothing.
    """

    policy: Policy | None = None
    yanked: bool = False
    dry_run: bool = False


DEFAULTS = CopySettings()


@dataclass(frozen=True)
class Copied:
    """A release that was copied from `source` to `url`, or with `dry_run` would be.

    `blobs` and `size_bytes`: number and size of the release's blobs; `sent` and `sent_bytes`: of those that the
    destination lacked. `fresh` is False if it had the release already. `signer`: the signer that the policy accepted;
    None if no signature was required.
    """

    name: str
    version: str
    source: str
    url: str
    blobs: int
    size_bytes: int
    sent: int
    sent_bytes: int
    fresh: bool
    aliases: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    signer: str | None = None
    has_signature: bool = False


@dataclass(frozen=True)
class Request:
    """A release to take from an open store, and where it goes.

    `source` and `destination` name the two registries in the record of the promotion. `pulled_as`: the references that
    a policy selects its rules by; by default version and aliases at the destination. `fix`: what to do about damage.
    """

    store: Store
    ref: Reference
    place: Place
    source: str
    destination: str
    settings: CopySettings = DEFAULTS
    pulled_as: tuple[str, ...] = ()
    fix: str = "publish the release again"

    def references(self, version: str) -> Sequence[str]:
        """Return the references whose rules of the policy are asked."""
        url, name = self.place.url, self.ref.name
        return self.pulled_as or [f"{url}/{name}@{wanted}" for wanted in (version, *self.place.aliases)]


@dataclass(frozen=True)
class Taken:
    """A release of a source, checked, as a destination gets it. `content` has no sources of bytes yet."""

    content: Content
    document: Document
    origin: Origin
    yank: Yank | None
    signer: str | None


@dataclass(frozen=True)
class _Documents:
    """The document of a release and the manifests in it, by their folder in the release: "" for the document."""

    document: Document
    signed: Mapping[str, SignedDocument]
    manifests: Mapping[str, Manifest]
    signer: str | None

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file of the release but the document, by its path."""
        files = {} if isinstance(self.document, Manifest) else self.document.variants
        entries = {f"{variant}/{MANIFEST}": entry.manifest for variant, entry in files.items()}
        inner = [(prefix, manifest.files) for prefix, manifest in self.manifests.items()]
        return entries | {f"{prefix}{path}": entry for prefix, listed in inner for path, entry in listed.items()}


def copy(
    reference: str, place: Place, settings: CopySettings = DEFAULTS, progress: ByteProgress = no_byte_progress
) -> Copied:
    """Copy a release, all its variants and signatures, to another registry; then set its aliases there.

    Copying again sends nothing. Of a release that is there, aliases are moved, and blobs that were lost are sent again.

    Raises:
        RefusedError: a signature is missing that the policy demands for a reference at the destination, or the release
            was yanked: nothing was written.
        ArtifactError: the destination has the version with another content, or without a signature of the source.
        CorruptError: bytes of the source that do not match their digest: the destination has no release of them.
        InputError: no such release, or an alias has a version's name, or the version an alias's.
        HostError: a registry is unreachable, or the destination is read-only.

    """
    ref = parse_reference(reference)
    check_registry(place.url)
    require([*extras_of(ref.url, place.url), *(("sign",) if settings.policy else ())], reference)
    names = absolute_url(ref.url), absolute_url(place.url)
    release = take(Request(open_store(ref.url), ref, place, *names, settings))
    return give(release, open_store(place.url), place, settings, progress)


def check_registry(url: str) -> None:
    """Reject the address of a release in the place of a registry's.

    Raises:
        InputError: misspelt, or with a version or alias.

    """
    check_spelling(url)
    registry, _, last = url.rstrip("/").rpartition("/")
    if "@" in last:
        what = "a release, expected a registry: name and version stay"
        raise InputError(what, where=url, fix=f"name the registry: {registry or '.'}")


def absolute_url(url: str) -> str:
    """Return the address of a registry as records have it: a folder as its absolute path without links."""
    return absolute(f"{url.rstrip('/')}/-").removesuffix("/-")


def take(request: Request) -> Taken:
    """Read a release and check it: yank, signatures, names, the manifests of all variants. Writes nothing.

    Raises:
        RefusedError, CorruptError, InputError: as `copy`.

    """
    ref, store = request.ref, request.store
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    yank = _usable(request, version)
    origin = Origin(store, ref.name, version, where=f"{ref.url}/{ref.name}@{version}", fix=request.fix)
    documents = _documents(request, origin, data)
    return Taken(_content(request, origin, documents), documents.document, origin, yank, documents.signer)


def _usable(request: Request, version: str) -> Yank | None:
    """Return the yank that goes along, if the settings allow yanked releases.

    Raises:
        RefusedError: the release was yanked, or its files were removed. InputError: an alias would lead to it.

    """
    name, where = request.ref.name, str(request.ref)
    if not request.settings.yanked:
        check_usable(request.store, name, version, where, "use another version, or add --allow-yanked")
    yank = request.store.read_yank(name, version)
    if yank is not None and yank.retired:
        raise RefusedError(f"{name}@{version} was retired: {yank.reason}", where=where, fix="use another version")
    if yank is not None and request.place.aliases:
        what = f"{name}@{version} was yanked ({yank.reason}); no alias can point at it"
        raise InputError(what, where="--alias", fix="omit --alias, or use another version")
    return yank


def _documents(request: Request, origin: Origin, data: bytes) -> _Documents:
    """Return the documents of a release; each is parsed after its signatures were checked."""
    ref = request.ref
    own, signer = _signed(request, origin, "", data)
    document = parse_document(data, str(ref))
    check_names(document, ref, origin.version)
    if isinstance(document, Manifest):
        signed, manifests = {"": own}, {"": document}
    else:
        entries = {f"{variant}/": each.manifest for variant, each in document.variants.items()}
        texts = {prefix: read_whole(origin, f"{prefix}{MANIFEST}", entry) for prefix, entry in entries.items()}
        signed = {"": own} | {prefix: _signed(request, origin, prefix, text)[0] for prefix, text in texts.items()}
        manifests = {prefix: parse(text, f"{ref}/{prefix}") for prefix, text in texts.items()}
    for prefix, manifest in manifests.items():
        if manifest.name != ref.name:
            raise mismatch("name", ref.name, manifest.name, ref)
        _check_builder(request, origin, prefix, manifest)
    return _Documents(document, signed, manifests, signer)


def _signed(request: Request, origin: Origin, prefix: str, data: bytes) -> tuple[SignedDocument, str | None]:
    """Return a document with its signatures, after a check for each reference at the destination; and its signer."""
    signed = signed_document(origin.store, origin.name, origin.version, prefix, data)
    found = [check_signatures(request.settings.policy, signed, where) for where in request.references(origin.version)]
    return signed, str(found[0].signer) if found[0] else None


def _check_builder(request: Request, origin: Origin, prefix: str, manifest: Manifest) -> None:
    if (policy := request.settings.policy) is not None:
        for where in request.references(origin.version):
            policy.check_builder(lambda: _small(origin, prefix, manifest, PROVENANCE), where)


def _small(origin: Origin, prefix: str, manifest: Manifest, name: str) -> bytes:
    """Return a small file of an artifact; empty if there is none, or it is too large to be one."""
    entry = manifest.files.get(name)
    return b"" if entry is None or entry.size > MAX_BYTES else read_whole(origin, f"{prefix}{name}", entry)


def _content(request: Request, origin: Origin, documents: _Documents) -> Content:
    ref, version, own = request.ref, origin.version, documents.signed[""]
    release = f"{ref.name}@{version}"
    earlier = read_promotions(request.store, ref.name, version, own.data, origin.where)
    promotion = _this_promotion(f"{request.source}/{release}", request.destination)
    signatures = [
        Signature(f"{prefix}{SIGNATURE}", part.sha256, data)
        for prefix, part in documents.signed.items()
        for data in part.signatures
    ]
    record = Signature(PROMOTED, own.sha256, promotion_text(release, own.sha256, (*earlier, promotion)))
    prefix, first = next(iter(documents.manifests.items()))
    lock = _small(origin, prefix, first, LOCK)
    page = card(documents.document, {each.rstrip("/"): part for each, part in documents.manifests.items()}, lock)
    return Content(ref.name, version, own.data, documents.files, {}, (*signatures, record), page)


def _this_promotion(source: str, destination: str) -> Promotion:
    """Return a promotion at the present time by the user, or the workflow, of this process."""
    now = this_move("")
    return Promotion(*map(_plain, (source, destination, now.when, now.who, builder(), invocation())))


def _plain(text: str) -> str:
    """Return a text as records have it: without control characters and lone surrogates, and not too long."""
    return "".join(c for c in text if c.isprintable())[:MAX_TEXT]


def give(
    release: Taken, store: Store, place: Place, settings: CopySettings, progress: ByteProgress = no_byte_progress
) -> Copied:  # fmt: skip
    """Write a release into a store: missing blobs, the document, aliases. The source is read as the bytes are sent.

    Raises:
        ArtifactError, CorruptError, InputError, HostError: as `copy`.

    """
    name, version = release.content.name, release.content.version
    for alias in place.aliases:
        check_alias(store, name, version, alias, place.url)
    if release.yank is None or store.read_yank(name, version) is None:
        check_version(store, release.document, place.url)
    exists = is_there(release, store, place.url)
    with _with_sources(release) as content:
        if settings.dry_run:
            return copied(release, place, store.missing(content, content.files), is_there=exists)
        with store.publishing():
            missing = store.missing(content, content.files)
            send_missing(store, content, missing, progress)
            if not exists and not store.create_release(unrecorded(store, content)):
                is_there(release, store, place.url)  # another process created it; raises if it differs
            if release.yank is not None:
                store.yank(name, version, release.yank)
            for alias in place.aliases:
                move_alias(store, name, alias, version, place.url)
    return copied(release, place, missing, is_there=exists)


def copied(release: Taken, place: Place, missing: Sequence[str], *, is_there: bool) -> Copied:
    """Return the result of a copy that sent these files; `is_there`: the destination had the release before."""
    no_string(missing, "missing", "paths")
    content, document = release.content, release.document
    own = hashlib.sha256(content.document).hexdigest()
    blobs = {entry.sha256: entry.size for entry in content.files.values()}
    return Copied(
        content.name, content.version, release.origin.where, place.url, len(blobs), sum(blobs.values()), len(missing),
        sum(content.files[path].size for path in missing), not is_there, place.aliases,
        () if isinstance(document, Manifest) else tuple(document.variants), release.signer,
        any(each.manifest_sha256 == own and each.path == SIGNATURE for each in content.signatures),
    )  # fmt: skip


@contextmanager
def _with_sources(release: Taken) -> Iterator[Content]:
    """Yield the content of a release with the source of each file, which can be read during the block."""
    stopped = threading.Event()
    with ThreadPoolExecutor(READERS, "read") as readers:
        sources: dict[str, Source] = {
            path: BlobSource(Reading(release.origin, path, entry, readers, stopped))
            for path, entry in release.content.files.items()
        }
        try:
            yield replace(release.content, sources=sources)
        finally:
            stopped.set()


def is_there(release: Taken, store: Store, url: str) -> bool:
    """Return whether a store has the release, byte for byte, with all signatures of the source.

    Raises:
        ArtifactError: it has the version with another content, or a signature is missing there.

    """
    content, origin = release.content, release.origin
    found, where = store.read_release(content.name, content.version), f"{url}/{content.name}@{content.version}"
    if found is None:
        return False
    if found != content.document:
        ours, theirs = digest_of(release.document), digest_of(parse_document(found, where))
        how = f"published {theirs}, {origin.where} has {ours}" if ours != theirs else "the same files, of another build"
        what = f"version already published with other content: {how}"
        raise ArtifactError(what, where=where, fix=ANOTHER)
    for each in content.signatures:
        listed = store.signatures(content.name, content.version, each.path, each.manifest_sha256)
        if each.path != PROMOTED and each.data not in listed:
            what = f"published already, without a signature that {origin.where} has ({each.path})"
            raise ArtifactError(what, where=where, fix=ANOTHER)
    return True
