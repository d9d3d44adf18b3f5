"""Artifacts -> immutable release: missing blobs, then the manifest, then aliases. Imports no torch.

Deletes nothing: a publish that is killed leaves blobs without a release, which the next publish uses.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pipeline.artifact.diff import diff
from pipeline.artifact.manifest import CACHE_KIND, SIGNATURE, FileEntry, Manifest
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, GateError, InputError, TandemError, no_string
from pipeline.files.atomic import write_atomic
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.recipe import load
from pipeline.registry.aliases import check_alias, move_alias
from pipeline.registry.card import card
from pipeline.registry.release import Bundle, Document, Index, all_files, digest_of, make_bundle, parse_document
from pipeline.registry.releases import check_usable, read_small
from pipeline.stores.base import Content, Report, Signature, Store, open_store, scheme_of

LOCK = "recipe.lock"
"""The lock of a pair's recipe, in its artifact."""
UNGATED = {"nxdi": "NxD Inference", CACHE_KIND: "vLLM's Neuron plugin"}
"""Compilers of artifacts that the gates cannot run, by backend; such artifacts need `--unvalidated`."""

Sign = Callable[[bytes], bytes]
"""Returns a signature over a manifest or an index."""

Own = Callable[[bytes, Sequence[bytes]], bool]
"""Returns whether one of these signatures over a manifest or an index is by the signer of `Sign`."""


@dataclass(frozen=True)
class Release:
    """A release that was published, or with `dry_run` would be.

    `sent` and `sent_bytes`: number and size of the blobs that the registry lacked. `fresh` is False if the registry had
    the release already. `has_signature`: the registry has a signature over the release's own document, which pulls that
    require signatures check first. `images`: references of its images for Kubernetes' image volumes.
    """

    name: str
    version: str
    url: str
    sent: int
    sent_bytes: int
    fresh: bool
    aliases: tuple[str, ...]
    has_signature: bool = False
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A registry that a release goes to, and the aliases that point at it there afterwards."""

    url: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        no_string(self.aliases, "aliases", "aliases")


def any_signature(document: bytes, signatures: Sequence[bytes]) -> bool:  # noqa: ARG001 - an `Own`
    """Return whether there is a signature, by whomever."""
    return bool(signatures)


@dataclass(frozen=True)
class PublishSettings:
    """Settings of `publish`.

    `version`: version of the release, by default from its content. `sign`: returns a signature; it signs each manifest,
    and the index that several artifacts or a chosen version give a release. The signatures are written beside the
    manifests once a release with them is published. `own`: whether a published release has a signature of this signer
    already; by default, any signature. `unvalidated`: allow artifacts without validation gates: packages of NxD
    Inference, compile caches. `dry_run`: send nothing. `image`: in OCI registries, also store an image of each
    artifact, which Kubernetes mounts as a volume.
    """

    version: str | None = None
    sign: Sign | None = None
    own: Own = any_signature
    unvalidated: bool = False
    dry_run: bool = False
    image: bool = False


DEFAULTS = PublishSettings()


@dataclass(frozen=True)
class Outcome:
    """The result of publishing to one place: a release, or the error."""

    url: str
    release: Release | None = None
    error: TandemError | None = None


def listed_places(roots: Sequence[Path]) -> list[Place]:
    """Return the places that the artifacts' recipes list under `publish`, in their order.

    Raises:
        RecipeError: a recipe in an artifact cannot be read.

    """
    no_string(roots, "roots", "paths")
    aliases: dict[str, tuple[str, ...]] = {}
    for root in roots:
        if not (root / "recipe.yaml").is_file():
            continue  # a compile cache has none
        for target in load(root / "recipe.yaml").publish:
            aliases[target.to] = tuple(dict.fromkeys((*aliases.get(target.to, ()), *target.aliases)))
    return [Place(url, names) for url, names in aliases.items()]


def publish(
    roots: Path | Sequence[Path],
    url: str,
    aliases: Sequence[str] = (),
    options: PublishSettings = DEFAULTS,
    progress: ByteProgress = no_byte_progress,
) -> Release:
    """Publish verified artifacts whose gates passed; publishing them again sends nothing.

    Several artifacts of one recipe become the variants of one release. An equal artifact that was built or validated
    at another time is the same release: the published release stays.

    Raises:
        GateError: an artifact was not validated, or failed.
        ArtifactError: an artifact does not verify, the version is taken by another content, or the release exists and
            is to be signed but lacks this signature.
        InputError: an alias has a version's name, or the version an alias's.
        HostError: the registry is unreachable or read-only.

    """
    no_string(roots, "roots", "paths")
    no_string(aliases, "aliases", "aliases")
    bundle = _verified_bundle([roots] if isinstance(roots, Path) else roots, options)
    return _publish(bundle, Place(url, tuple(aliases)), _signing_once(options), progress)


def publish_all(
    roots: Sequence[Path],
    places: Sequence[Place],
    options: PublishSettings = DEFAULTS,
    progress: ByteProgress = no_byte_progress,
) -> list[Outcome]:
    """Publish as `publish` does, to each place in turn; a failure at one place does not stop the others.

    Raises:
        GateError: an artifact was not validated, or failed.
        ArtifactError: an artifact does not verify.

    """
    no_string(roots, "roots", "paths")
    no_string(places, "places", "places")
    bundle, outcomes = _verified_bundle(roots, options), []
    options = _signing_once(options)
    for place in places:
        try:
            outcomes.append(Outcome(place.url, _publish(bundle, place, options, progress)))
        except TandemError as error:
            outcomes.append(Outcome(place.url, error=error))
    return outcomes


def sends_ahead(url: str) -> bool:
    """Return whether a registry takes files before their release: not a Hub, whose files belong to commits."""
    return scheme_of(url)[0] != "hf"


def send_ahead(url: str, root: Path, files: Mapping[str, FileEntry], report: Report) -> list[str]:
    """Store files of an artifact that is not complete yet, those that the registry lacks; return their paths.

    Readers see no release. A later publish finds the files; without one, `tandem gc` removes them.

    Raises:
        HostError: the registry is unreachable or read-only. ArtifactError: a file has another digest.

    """
    store, sources = open_store(url), {path: root / path for path in files}
    content = Content("", "", b"", files, sources)
    with store.publishing():
        missing = store.missing(content, files)
        store.send(content, missing, report)
    return missing


def _verified_bundle(roots: Sequence[Path], options: PublishSettings) -> Bundle:
    artifacts = [verify(root) for root in roots]
    for artifact in artifacts:
        _check_gates(artifact.manifest, artifact.root, options.unvalidated)
    return make_bundle(artifacts, options.version)


def _signing_once(options: PublishSettings) -> PublishSettings:
    """Return settings that sign each document once, for all places; not before a place lacks the release."""
    return options if options.sign is None else replace(options, sign=cache(options.sign))


def _publish(bundle: Bundle, place: Place, options: PublishSettings, progress: ByteProgress) -> Release:
    url, store = place.url, open_store(place.url)
    for alias in place.aliases:
        check_alias(store, bundle.document.name, bundle.document.version, alias, url)
    check_version(store, bundle.document, url)
    content = _content(bundle)
    if options.dry_run:
        published, missing = _missing(store, bundle, content, url)
        if published is not None:
            _check_signed(store, published, options, url)
        return _release(bundle, place, published, missing, store)
    with store.publishing():
        published, missing = _missing(store, bundle, content, url)
        if published is None:
            content = replace(content, signatures=tuple(_signatures(bundle, options.sign)))
        else:
            _check_signed(store, published, options, url)
        send_missing(store, content, missing, progress)
        if published is None and not store.create_release(content):
            by_another_process = _published(store, bundle.document, url)  # raises if it differs
            _check_signed(store, by_another_process or bundle.document, options, url)
        images = _write_images(store, bundle, content, progress) if options.image and url.startswith("oci://") else ()
        for alias in place.aliases:
            move_alias(store, content.name, alias, content.version, url)
    if published is None and options.sign is not None:
        _keep_signatures(bundle, options.sign)
    return replace(_release(bundle, place, published, missing, store), images=images)


def _write_images(store: Store, bundle: Bundle, content: Content, progress: ByteProgress) -> tuple[str, ...]:
    from pipeline.stores.oci_image import image_bytes, write_images  # late: needs the extra `oci`

    signatures = content.signatures or tuple(_signatures(bundle, None))
    total, done = image_bytes(content), 0

    def report(size: int) -> None:
        nonlocal done
        done = min(total, done + size)
        progress(done, total)

    return tuple(write_images(store, replace(content, signatures=signatures), report))


def _check_signed(store: Store, published: Document, options: PublishSettings, url: str) -> None:
    """Reject a published release without the signature that this publish is to give it: a release never changes."""
    data, found = _signed(store, published)
    if options.sign is None or (found and options.own(data, found)):
        return
    what = f"{published.name}@{published.version} exists and is not signed{' by this key' if found else ''}"
    raise ArtifactError(what, where=url, fix="publish under another version: --version VERSION, with --sign")


def _signed(store: Store, document: Document) -> tuple[bytes, list[bytes]]:
    """Return the document of a published release as the registry has it, and the signatures over it."""
    data = store.read_release(document.name, document.version) or b""
    sha256 = hashlib.sha256(data).hexdigest()
    return data, store.signatures(document.name, document.version, SIGNATURE, sha256) if data else []


def _keep_signatures(bundle: Bundle, sign: Sign) -> None:
    """Write the signatures over the manifests, which were published, beside the manifests."""
    for artifact in bundle.artifacts.values():
        write_atomic(artifact.root / SIGNATURE, sign(artifact.data))


def check_version(store: Store, document: Document, url: str) -> None:
    """Reject a version that was yanked, or that has the name of an alias, which it would hide.

    Raises:
        InputError: an alias has this name. RefusedError: the version was yanked.

    """
    if store.read_alias(document.name, document.version) is not None:
        what = f"version {document.version!r} is an alias of {document.name}"
        raise InputError(what, where=url, fix="choose another version, or omit --version")
    check_usable(store, document.name, document.version, url, "publish under another version: --version VERSION")


def _release(
    bundle: Bundle, place: Place, published: Document | None, missing: Sequence[str], store: Store
) -> Release:  # fmt: skip
    size = sum(bundle.files[path].size for path in missing)
    name, version = bundle.document.name, bundle.document.version
    _, signatures = _signed(store, bundle.document)
    return Release(name, version, place.url, len(missing), size, published is None, place.aliases, bool(signatures))


def _check_gates(manifest: Manifest, root: Path, unvalidated: bool) -> None:
    if (compiler := UNGATED.get(manifest.kind)) is not None:
        if not unvalidated:
            what = f"{manifest.name} has no validation gates: it was compiled by {compiler}"
            raise GateError(what, where=str(root), fix="check it on its chip, then publish it with --unvalidated")
    elif manifest.passed is not True:
        if manifest.passed is None:
            raise GateError(f"{manifest.name} was not validated", where=str(root), fix=f"tandem validate {root}")
        fix = f"`tandem report {root}` shows what failed; correct the draft, the recipe or its limits, and build again"
        raise GateError(f"{manifest.name} failed its gates", where=str(root), fix=fix)


def _content(bundle: Bundle) -> Content:
    manifests = {prefix: artifact.manifest for prefix, artifact in bundle.artifacts.items()}
    lock = next(iter(bundle.artifacts.values())).root / LOCK
    return Content(
        bundle.document.name, bundle.document.version, bundle.data, bundle.files, bundle.sources,
        (), card(bundle.document, manifests, lock.read_bytes() if lock.is_file() else b""),
    )  # fmt: skip


def _signatures(bundle: Bundle, sign: Sign | None) -> Iterable[Signature]:
    """Yield the signatures of a new release: by `sign`, or those in the artifacts' folders."""
    if sign is not None and isinstance(bundle.document, Index):
        yield Signature(SIGNATURE, hashlib.sha256(bundle.data).hexdigest(), sign(bundle.data))
    for prefix, artifact in bundle.artifacts.items():
        path, manifest = artifact.root / SIGNATURE, artifact.data
        if sign is not None or path.is_file():
            data = path.read_bytes() if sign is None else sign(manifest)
            yield Signature(f"{prefix}/{SIGNATURE}".lstrip("/"), hashlib.sha256(manifest).hexdigest(), data)


def _published(store: Store, document: Document, url: str) -> Document | None:
    """Return the same release as the registry has it, or None.

    Raises:
        ArtifactError: the version is taken by another content.

    """
    data = store.read_release(document.name, document.version)
    if data is None:
        return None
    where = f"{url}/{document.name}@{document.version}"
    published = parse_document(data, where)
    ours, theirs = digest_of(document), digest_of(published)
    if ours == theirs:
        return published
    changed = ", ".join(_changed(published, document)[:5])
    what = f"version already published with other content: published {theirs}, yours {ours}; different: {changed}"
    raise ArtifactError(what, where=where, fix="a release never changes: publish another version with --version")


def _changed(published: Document, ours: Document) -> list[str]:
    if isinstance(published, Manifest) and isinstance(ours, Manifest):
        files = [name for name in ours.files if ours.files[name] != published.files.get(name)]
        return [*diff(published, ours)["fields"], *files]
    return ["variants"]


def _missing(store: Store, bundle: Bundle, content: Content, url: str) -> tuple[Document | None, list[str]]:
    """Return the published release, or None, and a path of each blob that the registry lacks.

    Of a published release, only blobs that it lists: blobs that were lost are sent again.
    """
    published, files = _published(store, bundle.document, url), bundle.files
    if published is not None:
        name, version = published.name, published.version
        listed = all_files(published, lambda path, entry: read_small(store, name, version, path, entry), url)
        files = {path: entry for path, entry in files.items() if listed.get(path) == entry}
    return published, store.missing(content, files)


def send_missing(store: Store, content: Content, missing: Sequence[str], progress: ByteProgress) -> None:
    """Store these files of a release, and report the bytes of all of them together."""
    no_string(missing, "missing", "paths")
    total, done, lock = sum(content.files[path].size for path in missing), 0, threading.Lock()

    def report(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    store.send(content, missing, report)
