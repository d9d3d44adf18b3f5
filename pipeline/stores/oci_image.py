"""The image of an artifact, which Kubernetes mounts as a volume: its files in layers that every runtime unpacks.

ModelPack's artifacts have files as layers, which containerd does not mount (containerd/containerd issue 11381). An
image has tar layers: one of graphs, one of other files, and the weights in others, which a new release may keep.
Source: github.com/opencontainers/image-spec (layer.md, config.md).
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.stores.base import Content, Report, Store
from pipeline.stores.oci import OciStore, check_tag
from pipeline.stores.oci_layout import (
    CREATED,
    DOCUMENT,
    MANIFEST_TYPE,
    TITLE,
    VARIANT,
    Document,
    architecture_of,
    descriptor,
)
from pipeline.stores.oci_tags import put_bytes
from pipeline.stores.sources import Source

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
IMAGE_OF = "dev.tandem.image.of"
"""Annotation with the version of the release."""
SUFFIX = "-image"
WEIGHTS, GRAPHS = "weights/", "graphs/"
WEIGHT_LAYERS = 64
"""Runtimes mount about 120 layers at most."""
PIECE_BYTES = 1 << 20
END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Member:
    """A file in a layer: bytes, or where they come from."""

    name: str
    size: int
    source: bytes | Source

    @property
    def header(self) -> bytes:
        """The tar header, which depends on name and size alone."""
        info = tarfile.TarInfo(self.name)
        info.size, info.mode = self.size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)


@dataclass(frozen=True)
class Layer:
    """A tar archive of files, made as it is read."""

    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return sum(len(member.header) + _padded(member.size) for member in self.members) + len(END)

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes."""
        for member in self.members:
            yield member.header
            if isinstance(member.source, bytes):
                yield member.source
            else:
                with member.source.open("rb") as file:
                    while piece := file.read(PIECE_BYTES):
                        yield piece
            yield bytes(_padded(member.size) - member.size)
        yield END

    def digest(self) -> str:
        """Return `sha256:` and the digest of the archive."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return f"sha256:{digest.hexdigest()}"


def write_images(store: Store, content: Content, report: Report) -> list[str]:
    """Store an image of each artifact of a release, unless it is there; returns their references without a scheme.

    Raises:
        InputError: not an OCI registry.

    """
    if not isinstance(store, OciStore):
        raise InputError("only an OCI registry holds images", where="--image", fix="publish to oci://host/path")
    outer = json.loads(content.document)
    variants = sorted(outer["variants"]) if outer.get("kind") == "variants" else [""]
    return [_write(store, content, variant, outer, report) for variant in variants]


def image_bytes(content: Content) -> int:
    """Return about how many bytes the images of a release have."""
    return sum(entry.size for entry in content.files.values())


def _write(store: OciStore, content: Content, variant: str, outer: Mapping[str, Any], report: Report) -> str:
    name = f"{content.version}-{variant}" if variant else content.version
    repo, tag = store.repository(content.name), check_tag(f"{name}{SUFFIX}", "version", store.where)
    reference = f"{store.registry.session.host}/{repo}:{tag}"
    if store.registry.manifest(repo, tag) is not None:
        return reference
    about_variant = outer["variants"][variant] if variant else outer
    layers = [(layer, layer.digest()) for layer in _layers(content, variant)]
    for layer, digest in layers:
        if store.registry.has_blob(repo, digest) is None:
            store.registry.put_blob(repo, digest, layer.size, layer.pieces)
        report(layer.size)
    config = _dump(
        {
            "architecture": architecture_of(about_variant["requires"]),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest for _, digest in layers]},
        }
    )
    put_bytes(store.registry, repo, config)
    about = {TITLE: content.name, IMAGE_OF: content.version}
    about |= ({CREATED: outer["created"]} if outer.get("created") else {}) | ({VARIANT: variant} if variant else {})
    listed = [{"mediaType": LAYER_TYPE, "digest": digest, "size": layer.size} for layer, digest in layers]
    body = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor(CONFIG_TYPE, config), "layers": listed,
        "annotations": about,
    }  # fmt: skip
    store.registry.put_manifest(repo, tag, Document(MANIFEST_TYPE, _dump(body)))
    return reference


def _layers(content: Content, variant: str) -> list[Layer]:
    """Return layers of weights, of graphs and of the other files; files of weights share a layer if there are many."""
    members = sorted(_members(content, variant), key=lambda member: member.name)
    weights = [member for member in members if member.name.startswith(WEIGHTS)]
    graphs = [member for member in members if member.name.startswith(GRAPHS)]
    others = [member for member in members if not member.name.startswith((WEIGHTS, GRAPHS))]
    share = max(1, -(-len(weights) // WEIGHT_LAYERS))
    groups = [weights[start : start + share] for start in range(0, len(weights), share)]
    return [Layer(tuple(group)) for group in (*groups, graphs, others) if group]


def _members(content: Content, variant: str) -> Iterator[Member]:
    """Yield the files of an artifact by their paths in its folder, with its manifest and signature."""
    start = f"{variant}/" if variant else ""
    if not variant:
        yield Member(DOCUMENT, len(content.document), content.document)
    for path, entry in content.files.items():
        if path.startswith(start):
            yield Member(path.removeprefix(start), entry.size, content.sources[path])
    for signature in content.signatures:
        folder, _, name = signature.path.rpartition("/")
        if folder == variant:
            yield Member(name, len(signature.data), signature.data)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _dump(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
