"""A release as OCI manifests: types, digests, platforms, and what a stranger's manifest may hold."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifact.manifest import FileEntry
from pipeline.errors import CorruptError, InputError
from pipeline.stores.base import Content, Signature, open_store
from pipeline.stores.oci_image import WEIGHT_LAYERS, Layer, Member, _layers
from pipeline.stores.oci_layout import digest_of, document_layer, layers_of, layout_of, manifests_of

FILES = {
    "weights/target/rank-0.safetensors": b"w",
    "graphs/decode/graph.pt2": b"g",
    "tokenizer/tokenizer.json": b"t",
    "reports/parity.json": b"r",
}


def content_of(tmp_path: Path, files: dict[str, bytes], outer: dict, signatures: tuple[Signature, ...] = ()) -> Content:
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    entries = {n: FileEntry(sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in files.items()}
    document = json.dumps(outer | {"created": "2026-01-01T00:00:00Z"}).encode()
    return Content("small", "1.0", document, entries, {n: tmp_path / n for n in files}, signatures, "# Card")


def path_of(layer: dict) -> str:
    path: str = layer["annotations"]["org.cncf.model.filepath"]
    return path


def test_artifact_has_modelpack_types(tmp_path):
    content = content_of(tmp_path, FILES, {"requires": {"machine": "x86_64"}})
    layout = layout_of(content)
    top = json.loads(layout.top.data)
    assert top["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert top["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    start = "application/vnd.cncf.model."
    types = {path_of(layer): layer["mediaType"].removeprefix(start) for layer in top["layers"]}
    assert types == {
        "README.md": "doc.v1.raw",
        "graphs/decode/graph.pt2": "code.v1.raw",
        "manifest.json": "weight.config.v1.raw",
        "reports/parity.json": "doc.v1.raw",
        "tokenizer/tokenizer.json": "weight.config.v1.raw",
        "weights/target/rank-0.safetensors": "weight.v1.raw",
    }
    config = json.loads(layout.blobs[top["config"]["digest"]])
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in top["layers"]]}
    assert config["descriptor"] == {"name": "small", "version": "1.0", "createdAt": "2026-01-01T00:00:00Z"}


def test_layer_digests_are_file_digests(tmp_path):
    top = json.loads(layout_of(content_of(tmp_path, FILES, {})).top.data)
    found = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in top["layers"]}
    assert {name: found[name] for name in FILES} == {name: digest_of(data) for name, data in FILES.items()}


def test_variants_are_an_index_with_platforms(tmp_path):
    files = {f"{v}/{n}": d for v in ("cpu-neon-tp1", "trn2-lnc2-tp8") for n, d in FILES.items()}
    variants = {
        "cpu-neon-tp1": {"requires": {"machine": "aarch64"}}, "trn2-lnc2-tp8": {"requires": {"chip": "trn2"}},
    }  # fmt: skip
    layout = layout_of(content_of(tmp_path, files, {"kind": "variants", "variants": variants}))
    entries = manifests_of(json.loads(layout.top.data), "index")
    assert [entry.get("platform", {}).get("architecture") for entry in entries] == [None, "arm64", "amd64"]
    assert [entry["digest"] for entry in entries[1:]] == [document.digest for document in layout.variants.values()]
    named = json.loads(layout.naming.data)
    assert json.loads(layout.blobs[document_layer(named, "x")["digest"]])["kind"] == "variants"
    inner = [
        layer["annotations"]["org.cncf.model.filepath"]
        for layer in json.loads(layout.variants["cpu-neon-tp1"].data)["layers"]
    ]
    assert inner == sorted(FILES)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"layers": {}},
        {"layers": [1]},
        {"layers": [{"digest": "sha256:../../etc/passwd", "size": 1}]},
        {"layers": [{"digest": "md5:" + "0" * 32, "size": 1}]},
        {"layers": [{"digest": "sha256:" + "0" * 64, "size": -1}]},
        {"layers": [{"digest": "sha256:" + "0" * 64, "size": "1"}]},
    ],
)
def test_strangers_manifest_is_refused(document):
    with pytest.raises(CorruptError):
        layers_of(document, "oci://host/small@1.0")


def test_manifest_without_the_document(tmp_path):
    with pytest.raises(CorruptError, match=r"no layer manifest\.json"):
        document_layer({"layers": []}, "oci://host/small@1.0")


def test_image_layers_are_tar_archives_of_the_files(tmp_path):
    signature = Signature("manifest.json.sig", "0" * 64, b"signed")
    content = content_of(tmp_path, FILES, {}, (signature,))
    found = {}
    for layer in _layers(content, ""):
        data = b"".join(layer.pieces())
        assert (len(data), digest_of(data)) == (layer.size, layer.digest())
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    assert found == FILES | {"manifest.json": content.document, "manifest.json.sig": b"signed"}


def test_image_has_few_layers_however_many_files(tmp_path):
    files = {f"weights/target/rank-{rank:03}.safetensors": b"%d" % rank for rank in range(200)}
    layers = _layers(content_of(tmp_path, files, {}), "")
    assert len(layers) <= WEIGHT_LAYERS + 1
    assert sorted(m.name for layer in layers for m in layer.members) == sorted([*files, "manifest.json"])


def test_layer_with_a_long_name_is_read_back():
    layer = Layer((Member("weights/" + "x" * 200, 3, b"abc"),))
    with tarfile.open(fileobj=io.BytesIO(b"".join(layer.pieces()))) as archive:
        assert archive.getnames() == ["weights/" + "x" * 200]


@pytest.mark.parametrize(
    "url", ["oci://", "oci://host/Upper", "oci://host/a//b", "oci://user@host/x", "oci://host/../x"]
)
def test_malformed_address(url):
    with pytest.raises(InputError, match="malformed host or path"):
        open_store(url)


@pytest.mark.parametrize(
    ("name", "version", "what"),
    [
        ("Small", "1.0", "no name 'Small'"),
        ("small", "1.0+cpu", r"no version '1\.0\+cpu'"),
        ("small", "_tandem.x", "no version"),
    ],
)
def test_names_that_no_tag_can_have(tmp_path, name, version, what):
    content = content_of(tmp_path, FILES, {})
    with pytest.raises(InputError, match=what) as caught:
        open_store("oci://127.0.0.1:9/org").missing(replace(content, name=name, version=version), content.files)
    assert caught.value.fix
