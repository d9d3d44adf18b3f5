"""A registry of OCI artifacts, where clusters keep their images: `oci://host/path`.

A name is a repository, a version a tag, a release a manifest (or an index of variants) in ModelPack's types, whose
layers are the files. An alias is a tag of the same manifest, and its moves are a record under a tag of its own. A
signature is a referrer of the manifest that it is over.

Blobs are never replaced. A tag can be, by anyone who may write: Tandem's own writers take turns by a lock
(`oci_tags.py`) and never move a version; a registry with immutable tags promises it for all writers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.errors import CorruptError, InputError, no_string
from pipeline.files.limits import SIGNATURE_BYTES, SIGNATURES, json_object
from pipeline.stores.alias_text import alias_text, moves_of
from pipeline.stores.base import (
    ALIAS_BYTES,
    SMALL_BYTES,
    Alias,
    Blob,
    Content,
    Move,
    Pinned,
    Removed,
    Report,
    Signature,
    Yank,
    in_parallel,
)
from pipeline.stores.objects import check_small, checked_pieces
from pipeline.stores.oci_api import ImmutableTagError, OciRegistry
from pipeline.stores.oci_layout import (
    EMPTY,
    INDEX_TYPE,
    PROMOTION_TYPE,
    RELEASE_TYPE,
    SIGNATURE_TYPE,
    SIGNED,
    VARIANT,
    VERSION,
    Descriptor,
    Document,
    Layout,
    annotations_of,
    descriptor,
    digest_of,
    document_layer,
    index_of,
    layers_of,
    layout_of,
    manifests_of,
    record,
)
from pipeline.stores.oci_tags import PREFIX, Held, put_bytes, read_record, under_lock, write_record
from pipeline.stores.promotions import PROMOTED
from pipeline.stores.yanks import YANK_BYTES, yank_of, yank_text

LOCATION = re.compile(r"(?P<host>[\w.-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?)(?P<path>(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)")
REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
PIECE_BYTES = 1 << 20
PARALLEL = 8
REFERRERS = 200
"""Referrers of a manifest that are looked at, whatever they are."""


def open_oci(location: str) -> OciStore:
    """Return the registry below a host and a path, without any request.

    Raises:
        InputError: malformed host or path.

    """
    match = LOCATION.fullmatch(location.rstrip("/"))
    if match is None:
        fix = "write oci://host/path in lower case; a release is oci://host/path/name@version"
        raise InputError("malformed host or path", where=f"oci://{location}", fix=fix)
    return OciStore(OciRegistry(match["host"]), match["path"].strip("/"))


class OciStore:
    """See `Store`. `path` is the start of its repositories' names."""

    def __init__(self, registry: OciRegistry, path: str) -> None:
        self.registry, self.path = registry, path
        self.where = f"oci://{registry.session.host}/{path}".rstrip("/")

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Protect nothing: registries keep new blobs for hours, and refuse a manifest whose blobs are gone."""
        yield

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:
        """Return one path for each blob that the repository lacks, small blobs first."""
        repo = self.repository(content.name)
        check_tag(content.version, "version", self.where)
        order = sorted({entry.sha256: path for path, entry in files.items()}.values(), key=lambda p: files[p].size)
        with ThreadPoolExecutor(PARALLEL, "look") as pool:
            sizes = list(pool.map(lambda p: self.registry.has_blob(repo, f"sha256:{files[p].sha256}"), order))
        return [path for path, size in zip(order, sizes, strict=True) if size not in (files[path].size, -1)]

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Send several files at a time, each in one request; the registry checks their digests."""
        no_string(paths, "paths", "paths")
        repo = self.repository(content.name)

        def upload(path: str) -> None:
            entry, source = content.files[path], content.sources[path]

            def pieces() -> Iterator[bytes]:
                return checked_pieces(source, entry.sha256, PIECE_BYTES)

            self.registry.put_blob(repo, f"sha256:{entry.sha256}", entry.size, pieces)
            report(entry.size)

        in_parallel(PARALLEL, upload, paths)

    def create_release(self, content: Content) -> bool:
        """Write manifests by their digests and signatures that refer to them, then the tag, which readers see."""
        repo, version = self.repository(content.name), check_tag(content.version, "version", self.where)
        layout = layout_of(content)
        in_parallel(PARALLEL, lambda data: put_bytes(self.registry, repo, data), [EMPTY, *layout.blobs.values()])
        for document in layout.documents:
            self.registry.put_manifest(repo, document.digest, document)

        def write(held: Held) -> bool:
            if self.registry.manifest(repo, version) is not None:
                return False
            for signature in content.signatures:
                self._attach(layout, signature, held)
            held.check()
            try:
                self.registry.put_manifest(repo, version, layout.top)
            except ImmutableTagError:
                return False  # another process created it in this moment
            now = self.registry.manifest(repo, version)
            return now is not None and now.digest == layout.top.digest

        return under_lock(self.registry, repo, write)

    def read_release(self, name: str, version: str) -> bytes | None:
        """Return the layer `manifest.json` of the tag's manifest, or of the one that names the variants."""
        repo, top = self.repository(name), self._release(name, version)
        if top is None:
            return None
        where = f"{self.where}/{name}@{version}"
        body = _body(top, where)
        if top.media_type == INDEX_TYPE:
            entry = next((e for e in manifests_of(body, where) if e.get("artifactType") == RELEASE_TYPE), None)
            named = self.registry.manifest(repo, entry["digest"]) if entry else None
            if named is None:
                raise CorruptError("the index of the release names no variants", where=where, fix="use another version")
            body = _body(named, where)
        return self._layer(repo, document_layer(body, where), SMALL_BYTES, where)

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:
        """Return the signatures, or promotions, among the referrers of the manifest that `path` stands beside."""
        repo, top = self.repository(name), self._release(name, version)
        if top is None:
            return []
        where, subject = f"{self.where}/{name}@{version}", top.digest
        folder = path.rpartition("/")[0]
        if folder and top.media_type == INDEX_TYPE:
            entries = manifests_of(_body(top, where), where)
            subject = next((e["digest"] for e in entries if e["annotations"].get(VARIANT) == folder), subject)
        found: dict[bytes, None] = {}
        for entry in itertools.islice(self._referrers(repo, subject, where), REFERRERS):
            found |= dict.fromkeys(self._signature(repo, entry, (_referrer_type(path), manifest_sha256), where))
        return list(itertools.islice(found, SIGNATURES))

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        """Read a range of a blob."""
        if not buffer:
            return 0
        count = self.registry.read_blob(self.repository(blob.name), f"sha256:{blob.sha256}", offset, buffer)
        if count is None:
            what = f"blob {blob.sha256} is missing"
            raise CorruptError(what, where=f"{self.where}/{blob.name}", fix="publish the release again")
        return count

    def names(self) -> list[str]:
        """Return the repositories one level below this path that hold releases.

        Raises:
            UnlistedError: the registry does not list its repositories.

        """
        start = f"{self.path}/" if self.path else ""
        names = [repo.removeprefix(start) for repo in self.registry.repositories() if repo.startswith(start)]
        return sorted(name for name in names if name and "/" not in name and self.versions(name))

    def versions(self, name: str) -> list[str]:
        """Return the tags whose manifests name them as their version."""
        return sorted(tag for tag, version in self._tags(name).items() if tag == version)

    def aliases(self, name: str) -> dict[str, str]:
        """Return the other tags, and the versions that their manifests name."""
        return {tag: version for tag, version in sorted(self._tags(name).items()) if version != tag}

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Return where a tag points; the newest move is made up where another tool moved the tag."""
        repo = self.repository(name)
        found = self.registry.manifest(repo, alias) if TAG.fullmatch(alias) else None
        if found is None:
            return None
        version = annotations_of(found.data, f"{self.where}/{name}").get(VERSION, "")
        if version == alias:
            return None
        stored = read_record(self.registry, repo, _record("alias", alias), ALIAS_BYTES)
        data, token = stored or (b"", "")
        moves = moves_of(data)
        if not version:
            return Alias("", f"{found.digest} {token}")
        if not moves or moves[0].version != version:
            moves = (Move(version), *moves)
        return Alias(version, f"{found.digest} {token}", moves)

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Move the tag while no other writer of Tandem has the lock; then record the move."""
        repo, tag = self.repository(name), check_tag(alias, "alias", self.where)
        target = self._release(name, move.version)
        if target is None:
            what = f"alias {alias!r} cannot point at {move.version!r}: there is no such release"
            raise InputError(what, where=f"{self.where}/{name}", fix="use a published version")

        def write(held: Held) -> bool:
            now = self.read_alias(name, alias)
            if (now.token if now else None) != (was.token if was else None):
                return False
            text = alias_text(move, now.moves if now else ())
            write_record(held, _record("alias", alias), text, first=(tag, target))
            return True

        return under_lock(self.registry, repo, write)

    def yank(self, name: str, version: str, yank: Yank) -> bool:
        """Write a record under a tag of its own."""

        def write(held: Held) -> bool:
            if self.read_yank(name, version) is not None:
                return False
            write_record(held, _record("yank", version), yank_text(yank))
            return True

        return under_lock(self.registry, self.repository(name), write)

    def read_yank(self, name: str, version: str) -> Yank | None:
        """Return the record, or None."""
        tag = _record("yank", version)
        stored = read_record(self.registry, self.repository(name), tag, YANK_BYTES) if TAG.fullmatch(tag) else None
        return yank_of(stored[0], f"{self.where}/{name}@{version}") if stored else None

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:  # noqa: ARG002
        """Remove nothing: a registry collects blobs that no manifest names by itself."""
        return Removed(0, 0, 0)

    def repository(self, name: str) -> str:
        """Return the repository of a name.

        Raises:
            InputError: no repository can have it.

        """
        if not REPOSITORY.fullmatch(name):
            what = f"an OCI registry has no name {name!r}: small letters and digits, with single . _ or - between them"
            raise InputError(what, where=self.where, fix="give the recipe another name")
        return f"{self.path}/{name}".lstrip("/")

    def _release(self, name: str, version: str) -> Document | None:
        """Return the manifest of a version, or None; a tag whose manifest names another version is an alias."""
        found = self.registry.manifest(self.repository(name), version) if TAG.fullmatch(version) else None
        if found is None or annotations_of(found.data, f"{self.where}/{name}").get(VERSION) != version:
            return None
        return found

    def _tags(self, name: str) -> dict[str, str]:
        """Return the tags of releases and the versions that their manifests name."""
        repo, where = self.repository(name), f"{self.where}/{name}"

        def version_of(tag: str) -> str:
            found = self.registry.manifest(repo, tag)
            return annotations_of(found.data, where).get(VERSION, "") if found is not None else ""

        tags = [tag for tag in self.registry.tags(repo) if not tag.startswith((PREFIX, "sha256-"))]
        with ThreadPoolExecutor(PARALLEL, "look") as pool:
            return {tag: version for tag, version in zip(tags, pool.map(version_of, tags), strict=True) if version}

    def _layer(self, repo: str, layer: Descriptor, limit: int, where: str) -> bytes:
        """Return a small layer, after its digest was checked."""
        check_small(layer["size"], limit, where)
        data = self.registry.read_small(repo, layer["digest"], layer["size"])
        if digest_of(data) != layer["digest"]:
            what = f"sha256 mismatch: expected {layer['digest']}, found {digest_of(data)}"
            raise CorruptError(what, where=where, fix="publish the release again")
        return data

    def _attach(self, layout: Layout, signature: Signature, held: Held) -> None:
        """Store a signature as a referrer; where the registry lists none, in the index of a tag."""
        repo, subject = held.repo, layout.subject(signature.path)
        named = descriptor(subject.media_type, subject.data)
        kind = _referrer_type(signature.path)
        document = record(kind, signature.data, {SIGNED: signature.manifest_sha256}, named)
        put_bytes(self.registry, repo, signature.data)
        if self.registry.put_manifest(repo, document.digest, document):
            return
        entry = descriptor(document.media_type, document.data) | {
            "artifactType": kind, "annotations": {SIGNED: signature.manifest_sha256},
        }  # fmt: skip
        tag = _fallback(subject.digest)
        entries = self._tagged_referrers(repo, subject.digest, self.where)
        if all(each["digest"] != entry["digest"] for each in entries):
            held.check()
            self.registry.put_manifest(repo, tag, index_of([*entries, entry]))

    def _referrers(self, repo: str, digest: str, where: str) -> Iterator[Descriptor]:
        """Yield the referrers that the registry lists, then those of the tag: some have the route and do not say so."""
        found = self.registry.referrers(repo, digest)
        if found is not None:
            yield from manifests_of(_body(Document(INDEX_TYPE, found), where), where)
        yield from self._tagged_referrers(repo, digest, where)

    def _tagged_referrers(self, repo: str, digest: str, where: str) -> list[Descriptor]:
        found = self.registry.manifest(repo, _fallback(digest))
        return manifests_of(_body(found, where), where) if found is not None else []

    def _signature(self, repo: str, entry: Descriptor, wanted: tuple[str, str], where: str) -> list[bytes]:
        """Return the signature that a referrer holds; none if it is large, of another type, or over another manifest.

        `wanted`: its type, and the digest of the manifest. Both are read from the referrer itself: some registries list
        no annotations, and another type.
        """
        kind, manifest_sha256 = wanted
        if entry["annotations"].get(SIGNED, manifest_sha256) != manifest_sha256:
            return []
        document = self.registry.manifest(repo, entry["digest"])
        if document is None or annotations_of(document.data, where).get(SIGNED) != manifest_sha256:
            return []
        body = _body(document, where)
        if body.get("artifactType") != kind:
            return []
        small = [layer for layer in layers_of(body, where)[:1] if layer["size"] <= SIGNATURE_BYTES]
        with suppress(CorruptError):  # anyone who may write can add a referrer
            return [self._layer(repo, layer, SIGNATURE_BYTES, where) for layer in small]
        return []


def check_tag(text: str, kind: str, where: str) -> str:
    """Return a text that a tag can have.

    Raises:
        InputError: it cannot; `kind` says what it is.

    """
    if not TAG.fullmatch(text) or text.startswith((PREFIX, "sha256-")):
        what = f"an OCI registry has no {kind} {text!r}: a tag has letters, digits, _ . and -"
        raise InputError(what, where=where, fix=f"use another {kind}")
    return text


def _referrer_type(path: str) -> str:
    """Return the type of a signature's referrer, or of that of a record of promotions, by its path in the release."""
    return PROMOTION_TYPE if path.rpartition("/")[2] == PROMOTED else SIGNATURE_TYPE


def _record(kind: str, name: str) -> str:
    return f"{PREFIX}{kind}.{name}"


def _fallback(digest: str) -> str:
    """Return the tag of the index of referrers, as the specification names it for registries without the route."""
    return digest.replace(":", "-")


def _body(document: Document, where: str) -> Mapping[str, Any]:
    return json_object(document.data, where, "OCI manifest")
