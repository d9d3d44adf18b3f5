"""Artifacts -> immutable release: missing blobs, then the manifest, then aliases. Imports no torch.

Deletes nothing: a publish that is killed leaves blobs without a release, which the next one uses.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact.diff import diff
from pipeline.artifact.manifest import CACHE_KIND, MANIFEST, SIGNATURE, Manifest
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, GateError, InputError, TandemError
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.recipe import load
from pipeline.registry.release import Bundle, Document, Index, all_files, bundle, digest_of, parse_document
from pipeline.registry.releases import check_alias, move_alias, read_small
from pipeline.stores.base import Content, Signature, Store, open_store

UNGATED = {"nxdi": "NxD Inference", CACHE_KIND: "vLLM's Neuron plugin"}
"""Whose code the gates here cannot run: such artifacts are published only as unvalidated."""

Sign = Callable[[bytes], bytes]
"""Makes a signature over an index, which, unlike a manifest, comes to be when it is published."""


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
class Place:
    """A registry that a release goes to, and the aliases that point at it there afterwards."""

    url: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of one place: a release, or why there is none."""

    url: str
    release: Release | None = None
    error: TandemError | None = None


def listed_places(roots: Sequence[Path]) -> list[Place]:
    """Where the recipes that artifacts were built from want them, in their order.

    Raises:
        RecipeError: a recipe in an artifact cannot be read.

    """
    found: dict[str, tuple[str, ...]] = {}
    for root in roots:
        if not (root / "recipe.yaml").is_file():
            continue  # a compile cache has none
        for one in load(root / "recipe.yaml").publish:
            found[one.to] = tuple(dict.fromkeys((*found.get(one.to, ()), *one.aliases)))
    return [Place(url, aliases) for url, aliases in found.items()]


def publish(
    roots: Path | Sequence[Path],
    url: str,
    aliases: Sequence[str] = (),
    *,
    version: str | None = None,
    sign: Sign | None = None,
    unvalidated: bool = False,
    dry_run: bool = False,
    progress: ByteProgress = no_byte_progress,
) -> Release:
    """Publish verified artifacts whose gates passed; publishing them again sends nothing.

    Several artifacts of one recipe become the variants of one release. An equal artifact that was built or validated
    at another time is the same release: the published one stays. `sign` signs what names variants, or a version that
    was chosen; an artifact is signed before. `unvalidated` lets pass what has no gates here: a package of NxD
    Inference, a compile cache.

    Raises:
        GateError: one was not validated, or failed.
        ArtifactError: one does not verify, or the version is taken by another content.
        InputError: an alias has the version's name, or a version that of an alias.
        HostError: the registry cannot be reached or written.

    """  # fmt: skip
    made = _bundled([roots] if isinstance(roots, Path) else roots, version, unvalidated, None if dry_run else sign)
    return _publish(made, Place(url, tuple(aliases)), dry_run, progress)


def publish_all(
    roots: Sequence[Path],
    places: Sequence[Place],
    *,
    version: str | None = None,
    sign: Sign | None = None,
    unvalidated: bool = False,
    dry_run: bool = False,
    progress: ByteProgress = no_byte_progress,
) -> list[Outcome]:
    """As `publish`, to each place in turn; one that fails does not keep it from the others.

    Raises:
        GateError: an artifact was not validated, or failed.
        ArtifactError: one does not verify.

    """
    made, found = _bundled(roots, version, unvalidated, None if dry_run else sign), []
    for place in places:
        try:
            found.append(Outcome(place.url, _publish(made, place, dry_run, progress)))
        except TandemError as error:
            found.append(Outcome(place.url, error=error))
    return found


def _bundled(roots: Sequence[Path], version: str | None, unvalidated: bool, sign: Sign | None) -> Bundle:
    artifacts = [verify(root) for root in roots]
    for one in artifacts:
        _check_gates(one.manifest, one.root, unvalidated)
    made = bundle(artifacts, version)
    return replace(made, signature=sign(made.data)) if sign and isinstance(made.document, Index) else made


def _publish(made: Bundle, place: Place, dry_run: bool, progress: ByteProgress) -> Release:
    url, store = place.url, open_store(place.url)
    for alias in place.aliases:
        check_alias(store, made.document.name, made.document.version, alias, url)
    _check_version(store, made.document, url)
    content = _content(made)
    if dry_run:
        return _release(made, place, *_missing(store, made, content, url))
    with store.publishing():
        there, missing = _missing(store, made, content, url)
        _send(store, content, missing, progress)
        if there is None and not store.create_release(content):
            _published(store, made.document, url)  # somebody else was faster: with the same content, or this raises
        for alias in place.aliases:
            move_alias(store, content.name, alias, content.version, url)
    return _release(made, place, there, missing)


def _check_version(store: Store, document: Document, url: str) -> None:
    """A version named like an alias would take its place, since a version never yields to an alias."""
    if store.read_alias(document.name, document.version) is not None:
        what = f"version {document.version!r} is an alias of {document.name}"
        raise InputError(what, where=url, fix="choose another version, or leave it out")


def _release(made: Bundle, place: Place, there: Document | None, missing: Sequence[str]) -> Release:
    size = sum(made.files[path].size for path in missing)
    name, version = made.document.name, made.document.version
    return Release(name, version, place.url, len(missing), size, there is None, place.aliases)


def _check_gates(manifest: Manifest, root: Path, unvalidated: bool) -> None:
    if (maker := UNGATED.get(manifest.kind)) is not None:
        if not unvalidated:
            what = f"{manifest.name} was compiled by {maker}, and has no gates here"
            raise GateError(what, where=str(root), fix="check it on its chip, then publish it with --unvalidated")
    elif manifest.passed is not True:
        state = "was not validated" if manifest.passed is None else "failed its gates"
        raise GateError(f"{manifest.name} {state}", where=str(root), fix=f"tandem validate {root}")


def _content(made: Bundle) -> Content:
    from pipeline.registry.card import card

    manifests = {prefix: one.manifest for prefix, one in made.artifacts.items()}
    root = next(iter(made.artifacts.values())).root
    return Content(
        made.document.name, made.document.version, made.data, made.files, made.sources,
        tuple(_signatures(made)), card(made.document, manifests, root),
    )  # fmt: skip


def _signatures(made: Bundle) -> Iterable[Signature]:
    if made.signature is not None:
        yield Signature(SIGNATURE, hashlib.sha256(made.data).hexdigest(), made.signature)
    for prefix, one in made.artifacts.items():
        path = one.root / SIGNATURE
        if path.is_file():
            digest = hashlib.sha256((one.root / MANIFEST).read_bytes()).hexdigest()
            yield Signature(f"{prefix}/{SIGNATURE}".lstrip("/"), digest, path.read_bytes())


def _published(store: Store, document: Document, url: str) -> Document | None:
    """The same release, if it is there.

    Raises:
        ArtifactError: its version is taken by another content.

    """
    data = store.read_release(document.name, document.version)
    if data is None:
        return None
    where = f"{url}/{document.name}@{document.version}"
    there = parse_document(data, where)
    ours, theirs = digest_of(document), digest_of(there)
    if ours == theirs:
        return there
    changed = _changed(there, document)
    what = f"this version is published with digest {theirs}, yours is {ours}; {', '.join(changed[:5])} differ"
    raise ArtifactError(what, where=where, fix="a release never changes: publish under another version")


def _changed(there: Document, ours: Document) -> list[str]:
    if isinstance(there, Manifest) and isinstance(ours, Manifest):
        files = [name for name in ours.files if ours.files[name] != there.files.get(name)]
        return [*diff(there, ours)["fields"], *files]
    return ["variants"]


def _missing(store: Store, made: Bundle, content: Content, url: str) -> tuple[Document | None, list[str]]:
    """The release if it is there, and a path of each blob that the registry lacks.

    Of a release that is there already, only what it lists: blobs that were lost are sent again.
    """
    there, files = _published(store, made.document, url), made.files
    if there is not None:
        name, version = there.name, there.version
        listed = all_files(there, lambda path, entry: read_small(store, name, version, path, entry), url)
        files = {path: entry for path, entry in files.items() if listed.get(path) == entry}
    return there, store.missing(content, files)


def _send(store: Store, content: Content, missing: Sequence[str], progress: ByteProgress) -> None:
    total, done, lock = sum(content.files[path].size for path in missing), 0, threading.Lock()

    def report(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    store.send(content, missing, report)
