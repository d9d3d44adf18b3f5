"""A release as OCI manifests: one a variant, in ModelPack's media types, and an index over several. Pure.

The layers of a manifest are the files of an artifact, unpacked, so the digest of a layer is the digest of its file.
Sources: github.com/opencontainers/image-spec (manifest.md, image-index.md) and github.com/modelpack/model-spec (v1).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import CorruptError
from pipeline.files.limits import json_object
from pipeline.stores.base import Content, Pinned

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
RELEASE_TYPE = "application/vnd.tandem.release.v1+json"
"""Artifact type of the manifest, in an index, whose layer names the variants of a release."""
SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PROMOTION_TYPE = "application/vnd.in-toto+json"
FILE_TYPES = (
    ("weights/", "application/vnd.cncf.model.weight.v1.raw"),
    ("graphs/", "application/vnd.cncf.model.code.v1.raw"),
    ("reports/", "application/vnd.cncf.model.doc.v1.raw"),
    ("README.md", "application/vnd.cncf.model.doc.v1.raw"),
    ("", "application/vnd.cncf.model.weight.config.v1.raw"),
)
"""Start of a file's path -> media type of its layer; the first that matches."""
ARCHITECTURES = {"aarch64": "arm64", "arm64": "arm64"}
"""Machine of a variant -> architecture, as an index names it; amd64 for others."""

VERSION = "org.opencontainers.image.version"
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
FILE_PATH = "org.cncf.model.filepath"
VARIANT = "dev.tandem.variant"
SIGNED = "dev.tandem.manifest.sha256"
"""Annotation of a signature: the digest of the `manifest.json` that it is over."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
DOCUMENT = "manifest.json"
CARD = "README.md"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A manifest or an index, as it is sent."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        """`sha256:` and the digest of the bytes."""
        return digest_of(self.data)


@dataclass
class Layout:
    """What a release is in a registry: the document that its tag names, others below it, and small blobs.

    `variants` has their documents by their folder in the release, `naming` the document whose layer names them. `blobs`
    are bytes that are no files on disk.
    """

    top: Document
    naming: Document | None = None
    variants: dict[str, Document] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def documents(self) -> tuple[Document, ...]:
        """All documents, those that others refer to first."""
        return (*self.variants.values(), *((self.naming,) if self.naming else ()), self.top)

    def subject(self, path: str) -> Document:
        """Return the document of the artifact that a signature at this path of the release is over."""
        return self.variants.get(path.rpartition("/")[0], self.top)


def layout_of(content: Content) -> Layout:
    """Return the layout of a release, which its content alone decides."""
    outer = json.loads(content.document)
    if outer.get("kind") != "variants":
        blobs: dict[str, bytes] = {}
        files = {path: (f"sha256:{entry.sha256}", entry.size) for path, entry in content.files.items()}
        added = {DOCUMENT: content.document} | ({CARD: content.card.encode()} if content.card else {})
        return Layout(_model(content, outer, files, added, blobs), blobs=blobs)
    return _variants(content, outer)


def architecture_of(requires: Mapping[str, str]) -> str:
    """Return the architecture of the hosts that an artifact runs on, in the words of image indexes."""
    return ARCHITECTURES.get(requires.get("machine", ""), "amd64")


def document_layer(document: Mapping[str, Any], where: str) -> Descriptor:
    """Return the layer of `manifest.json`.

    Raises:
        CorruptError: there is none.

    """
    for layer in layers_of(document, where):
        if layer["annotations"].get(TITLE) == DOCUMENT:
            return layer
    raise CorruptError("the OCI manifest has no layer manifest.json", where=where, fix="use another version")


def layers_of(document: Mapping[str, Any], where: str) -> list[Descriptor]:
    """Return the layers of a manifest, of which only digest, size and annotations are read.

    Raises:
        CorruptError: malformed.

    """
    return [_checked(entry, where) for entry in _list(document, "layers", where)]


def manifests_of(index: Mapping[str, Any], where: str) -> list[Descriptor]:
    """Return the entries of an index.

    Raises:
        CorruptError: malformed.

    """
    return [_checked(entry, where) for entry in _list(index, "manifests", where)]


def annotations_of(data: bytes, where: str) -> Mapping[str, str]:
    """Return the annotations of a document; empty if it has none."""
    found = json_object(data, where, "OCI manifest").get("annotations")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def attached(
    subject: Document | Descriptor, artifact_type: str, data: bytes, annotations: Mapping[str, str]
) -> Document:
    """Return a manifest with one layer that refers to another manifest, as signatures do."""
    if isinstance(subject, Document):
        subject = descriptor(subject.media_type, subject.data)
    return record(artifact_type, data, annotations, {key: subject[key] for key in ("mediaType", "digest", "size")})


def record(
    artifact_type: str, data: bytes, annotations: Mapping[str, str], subject: Descriptor | None = None
) -> Document:
    """Return a manifest whose one layer is `data`."""
    layer = descriptor(artifact_type, data)
    body = _manifest(artifact_type, descriptor(EMPTY_TYPE, EMPTY), [layer], annotations)
    return Document(MANIFEST_TYPE, _dump(body | ({"subject": subject} if subject else {})))


def index_of(entries: list[Descriptor], annotations: Mapping[str, str] | None = None) -> Document:
    """Return an index over manifests."""
    body: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
    return Document(INDEX_TYPE, _dump(body | ({"annotations": dict(annotations)} if annotations else {})))


def descriptor(media_type: str, data: bytes) -> Descriptor:
    """Return the descriptor of bytes."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def digest_of(data: bytes) -> str:
    """Return `sha256:` and the digest of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _variants(content: Content, outer: Mapping[str, Any]) -> Layout:
    """Return an index: the document that names the variants, then a manifest a variant."""
    blobs = {EMPTY_DIGEST: EMPTY, digest_of(content.document): content.document}
    annotations, variants = _about(content, outer), {}
    layer = _file(DOCUMENT, digest_of(content.document), len(content.document))
    naming = Document(
        MANIFEST_TYPE, _dump(_manifest(RELEASE_TYPE, descriptor(EMPTY_TYPE, EMPTY), [layer], annotations))
    )
    entries = [descriptor(MANIFEST_TYPE, naming.data) | {"artifactType": RELEASE_TYPE}]
    for variant, entry in sorted(outer["variants"].items()):
        variants[variant] = _model(content, outer, dict(_inside(content.files, variant)), {}, blobs)
        platform = {"architecture": architecture_of(entry["requires"]), "os": "linux"}
        about = {"artifactType": MODEL_TYPE, "platform": platform, "annotations": {VARIANT: variant}}
        entries.append(descriptor(MANIFEST_TYPE, variants[variant].data) | about)
    return Layout(index_of(entries, annotations), naming, variants, blobs)


def _inside(files: Mapping[str, Pinned], variant: str) -> Iterator[tuple[str, tuple[str, int]]]:
    for path, entry in files.items():
        if path.startswith(f"{variant}/"):
            yield path.removeprefix(f"{variant}/"), (f"sha256:{entry.sha256}", entry.size)


def _model(
    content: Content,
    outer: Mapping[str, Any],
    files: Mapping[str, tuple[str, int]],
    added: Mapping[str, bytes],
    blobs: dict[str, bytes],
) -> Document:
    """Return a manifest in ModelPack's types; puts the bytes that are no files into `blobs`."""
    files = {**files, **{path: (digest_of(data), len(data)) for path, data in added.items()}}
    layers = [_file(path, *files[path]) for path in sorted(files)]
    config = _dump(_config(content, outer, [layer["digest"] for layer in layers]))
    blobs |= {digest_of(data): data for data in (config, *added.values())}
    return Document(
        MANIFEST_TYPE, _dump(_manifest(MODEL_TYPE, descriptor(CONFIG_TYPE, config), layers, _about(content, outer)))
    )


def _config(content: Content, outer: Mapping[str, Any], digests: list[str]) -> dict[str, Any]:
    """Return ModelPack's description of a model: its schema allows no other keys."""
    about = {"name": content.name, "version": content.version}
    created = {"createdAt": outer["created"]} if outer.get("created") else {}
    return {
        "descriptor": about | created,
        "config": {"format": "tandem"},
        "modelfs": {"type": "layers", "diffIds": digests},
    }


def _about(content: Content, outer: Mapping[str, Any]) -> dict[str, str]:
    created = {CREATED: outer["created"]} if outer.get("created") else {}
    return {TITLE: content.name, VERSION: content.version} | created


def _file(path: str, digest: str, size: int) -> Descriptor:
    media_type = next(name for start, name in FILE_TYPES if path.startswith(start))
    return {
        "mediaType": media_type,
        "digest": digest,
        "size": size,
        "annotations": {FILE_PATH: path, TITLE: path},
    }


def _manifest(
    artifact_type: str, config: Descriptor, layers: list[Descriptor], annotations: Mapping[str, str]
) -> dict[str, Any]:
    head = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": artifact_type}
    return head | {"config": config, "layers": layers, "annotations": dict(annotations)}


def _checked(entry: Any, where: str) -> Descriptor:
    """Return a descriptor whose digest and size have their types."""
    fine = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("digest"), str)
    if not fine or not DIGEST.fullmatch(entry["digest"]) or entry["size"] < 0:
        raise CorruptError("malformed descriptor in the OCI manifest", where=where, fix="use another version")
    annotations = entry.get("annotations")
    return {**entry, "annotations": annotations if isinstance(annotations, dict) else {}}


def _list(document: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = document.get(key)
    if not isinstance(found, list):
        raise CorruptError(f"the OCI manifest has no list {key}", where=where, fix="use another version")
    return found


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


EMPTY_DIGEST = digest_of(EMPTY)
