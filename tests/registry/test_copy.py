"""Copies from registry to registry: the same bytes and signatures, whole or absent."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, read
from pipeline.artifact.reports import add_reports
from pipeline.errors import ArtifactError, CorruptError, InputError
from pipeline.files.unfinished import TEMP
from pipeline.registry.aliases import history, list_aliases
from pipeline.registry.copy import CopySettings, copy
from pipeline.registry.parts import Origin, read_whole
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.pull import pull
from pipeline.registry.releases import list_releases
from pipeline.stores.base import open_store
from support import small_artifacts as small

FORK = multiprocessing.get_context("fork")


def variants_of(root: Path, folder: Path) -> list[Path]:
    """An artifact, and a copy of it that says it is for another chip."""
    other = Path(shutil.copytree(root, folder))
    data = json.loads((other / MANIFEST).read_text()) | {"requires": {"device": "neuron", "chip": "trn2"}}
    (other / MANIFEST).write_text(json.dumps(data))
    return [root, other]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, validated: Path) -> Path:
    """A registry with the release 1.0 of two variants, with a signature over the index and each manifest."""
    folder = tmp_path_factory.mktemp("copied")
    sign = PublishSettings(version="1.0", sign=lambda document: b"over " + hashlib.sha256(document).digest())
    roots = variants_of(Path(shutil.copytree(validated, folder / "one")), folder / "two")
    publish(roots, str(folder / "dev"), ["latest"], sign)
    return folder / "dev"


@pytest.fixture
def dev(tmp_path: Path, source: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "dev"))


@pytest.fixture
def prod(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "prod"))


def blob(registry: Path, root: Path, name: str) -> Path:
    sha256 = read(root).manifest.files[name].sha256
    return registry / "blobs/sha256" / sha256[:2] / sha256


def test_copy_keeps_every_byte_of_all_variants_and_signatures(dev, prod):
    copied = copy(f"{dev}/small@latest", prod)
    assert (copied.version, copied.fresh, len(copied.variants), copied.has_signature) == ("1.0", True, 2, True)
    assert copied.sent == copied.blobs > 10
    assert small.kept(Path(prod.url)) == small.kept(dev)
    assert sum(name.startswith("signatures/") for name in small.kept(dev)) == 3
    assert not list(Path(prod.url).rglob(f"{TEMP}*"))


def test_copy_again_sends_nothing(dev, prod):
    copy(f"{dev}/small@1.0", prod)
    before = small.digests(Path(prod.url))
    again = copy(f"{dev}/small@1.0", prod)
    assert (again.sent, again.sent_bytes, again.fresh) == (0, 0, False)
    assert small.digests(Path(prod.url)) == before


def test_copy_sends_only_what_the_destination_lacks(tmp_path, made, prod):
    """New graphs over weights that are there."""
    publish(made, str(tmp_path / "reg"), [], PublishSettings(version="1"))
    copy(f"{tmp_path}/reg/small@1", prod)
    other = small.make_validated(tmp_path / "other", tmp_path / "work", graph=b"new").root
    publish(other, str(tmp_path / "reg"), [], PublishSettings(version="2"))
    copied = copy(f"{tmp_path}/reg/small@2", prod)
    assert 0 < copied.sent < copied.blobs
    assert copied.sent_bytes < copied.size_bytes
    assert small.kept(Path(prod.url)) == small.kept(tmp_path / "reg")


def test_copy_sends_blobs_again_that_the_destination_lost(dev, prod):
    copy(f"{dev}/small@1.0", prod)
    lost, *_ = sorted((Path(prod.url) / "blobs").rglob("*/????*"), key=lambda path: -path.stat().st_size)
    lost.unlink()
    assert copy(f"{dev}/small@1.0", prod).sent == 1
    assert small.kept(Path(prod.url)) == small.kept(dev)


def test_copy_dry_run_writes_nothing(dev, prod):
    settings = CopySettings(dry_run=True)
    copied = copy(f"{dev}/small@1.0", Place(prod.url, ("live",)), settings)
    assert (copied.sent, copied.fresh) == (copied.blobs, True)
    assert not Path(prod.url).exists()
    copy(f"{dev}/small@1.0", prod)
    assert copy(f"{dev}/small@1.0", prod, settings).sent == 0


def test_copy_sets_aliases_with_who_moved_them(dev, prod, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTOR", "alice")
    copy(f"{dev}/small@1.0", Place(prod.url, ("live", "canary")))
    assert list_aliases(prod.url, "small") == {"canary": "1.0", "live": "1.0"}
    assert [move.who for move in history(prod.url, "small", "live").moves] == ["alice"]


def test_copy_rejects_an_alias_that_is_a_version_before_it_writes(dev, prod):
    with pytest.raises(InputError, match=r"alias '1\.0' is a version"):
        copy(f"{dev}/small@1.0", Place(prod.url, ("1.0",)))
    assert not Path(prod.url).exists()


@pytest.mark.parametrize("place", ["reg/small@1.0", "s3://bucket/small@prod", "reg/small@1.0/"])
def test_copy_to_a_release_is_rejected(dev, place):
    """`tandem copy dev/small@1 prod/small@1` would have made a registry in a folder `prod/small@1`."""
    with pytest.raises(InputError, match="a release, expected a registry") as caught:
        copy(f"{dev}/small@1.0", Place(place))
    assert caught.value.fix == f"name the registry: {place.rpartition('/small')[0]}"


def test_copy_of_a_release_that_is_not_there_lists_those_that_are(dev, prod):
    with pytest.raises(InputError, match="no version or alias '2'") as caught:
        copy(f"{dev}/small@2", prod)
    assert "1.0, latest" in caught.value.fix
    assert not Path(prod.url).exists()


def test_copy_refuses_a_version_with_other_content(tmp_path, dev, prod):
    other = small.make_validated(tmp_path / "other", tmp_path / "work", weights=b"other").root
    publish(other, prod.url, ["live"], PublishSettings(version="1.0"))
    before = small.digests(Path(prod.url))
    with pytest.raises(ArtifactError, match=r"other content: published \w{64}, .*small@1\.0 has \w{64}") as caught:
        copy(f"{dev}/small@1.0", prod)
    assert "never changes" in caught.value.fix
    assert small.digests(Path(prod.url)) == before


def test_copy_refuses_another_build_of_the_same_content(tmp_path, made, prod):
    """Equal files under another manifest: the signatures of the source would not fit, and digests would differ."""
    publish(made, str(tmp_path / "reg"))
    add_reports(made, {"parity.json": b"[later]"}, {"passed": True, "run": 2})
    publish(made, prod.url)
    with pytest.raises(ArtifactError, match="the same files, of another build"):
        copy(f"{tmp_path}/reg/small@{read(made).manifest.version}", prod)


def test_copy_refuses_a_release_that_lacks_a_signature_there(dev, prod):
    copy(f"{dev}/small@1.0", prod)
    shutil.rmtree(Path(prod.url) / "signatures")
    with pytest.raises(ArtifactError, match=r"without a signature that .*small@1\.0 has \(signature\)"):
        copy(f"{dev}/small@1.0", prod)


@pytest.mark.parametrize("name", [small.WEIGHTS, "recipe.yaml", "graphs/decode-b1-t1-s32/graph.bin"])
def test_copy_of_a_damaged_blob_is_refused_and_loses_nothing(dev, prod, made, name):
    path = blob(dev, made, name)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptError, match=f"sha256 mismatch: expected {path.name}") as caught:
        copy(f"{dev}/small@1.0", Place(prod.url, ("live",)))
    assert caught.value.where.startswith(f"{dev}/small@1.0: ")
    assert caught.value.fix == "publish the release again"
    assert open_store(prod.url).names() == []
    assert not blob(Path(prod.url), made, name).exists()
    path.write_bytes(good)
    copied = copy(f"{dev}/small@1.0", Place(prod.url, ("live",)))
    assert copied.sent <= copied.blobs
    assert small.kept(Path(prod.url)) == small.kept(dev)


@pytest.mark.parametrize("cut", ["missing", "short", "empty"])
def test_copy_of_a_blob_that_is_gone(dev, prod, made, cut):
    path = blob(dev, made, small.WEIGHTS)
    if cut == "missing":
        path.unlink()
    else:
        os.truncate(path, 5 if cut == "short" else 0)
    with pytest.raises(CorruptError, match=r"missing|truncated in the registry"):
        copy(f"{dev}/small@1.0", prod)
    assert open_store(prod.url).names() == []


@pytest.mark.parametrize("field", ["name", "version"])
def test_copy_of_a_document_of_another_release(dev, prod, field):
    path = dev / "releases/small/1.0" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "other"}))
    with pytest.raises(CorruptError, match=f"{field} mismatch in the manifest"):
        copy(f"{dev}/small@1.0", prod)
    assert not Path(prod.url).exists()


def test_copy_of_a_variant_of_another_name(dev, prod, tmp_path, made):
    """An index that names the manifest of another artifact."""
    data = json.loads((made / MANIFEST).read_text()) | {"name": "evil"}
    text = json.dumps(data).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    place = dev / "blobs/sha256" / sha256[:2] / sha256
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(text)
    path = dev / "releases/small/1.0" / MANIFEST
    index = json.loads(path.read_text())
    index["variants"]["trn2-tp1"]["manifest"] = {"sha256": sha256, "size": len(text)}
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="name mismatch in the manifest: expected 'small', found 'evil'"):
        copy(f"{dev}/small@1.0", prod)


def test_copy_holds_parts_of_a_blob_in_memory(tmp_path, made, prod):
    """A file of 80 MB: a few parts of it at a time."""
    path, data = made / small.WEIGHTS, json.loads((made / MANIFEST).read_text())
    os.truncate(path, 80_000_000)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    data["files"][small.WEIGHTS] = {"sha256": digest, "size": 80_000_000}
    (made / MANIFEST).write_text(json.dumps(data))
    publish(made, str(tmp_path / "reg"), ["latest"])
    tracemalloc.start()
    try:
        copied = copy(f"{tmp_path}/reg/small@latest", prod)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert copied.sent_bytes > 80_000_000
    assert peak < 40_000_000
    assert small.kept(Path(prod.url)) == small.kept(tmp_path / "reg")


def _copy(reference: str, place: Place) -> None:
    copy(reference, place)


def test_copy_killed_then_complete(tmp_path, prod):
    """kill -9 at any moment: readers see no release or the whole one, and copying again completes it."""
    made = small.make_validated(tmp_path / "out", tmp_path / "work", size=3_000_000).root
    dev, place, stopped = tmp_path / "dev", Place(prod.url, ("live",)), 0
    version = publish(made, str(dev), ["latest"]).version
    whole = {entry.sha256 for entry in read(made).manifest.files.values()}
    for delay_s in (0.02, 0.05, 0.08, 0.12, 0.2):
        process = FORK.Process(target=_copy, args=(f"{dev}/small@latest", place))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        stopped += process.exitcode != 0
        store = open_store(prod.url)
        if store.read_release("small", version) is not None:
            assert whole <= {path.name for path in (Path(prod.url) / "blobs").rglob("*")}
        else:
            assert store.read_alias("small", "live") is None
    assert stopped
    copy(f"{dev}/small@latest", place)
    assert small.kept(Path(prod.url)) == small.kept(dev)
    out = pull(f"{prod.url}/small@live", tmp_path / "pulled", cache=tmp_path / "cache")
    assert small.digests(out) == small.digests(made)
    assert len(list_releases(prod.url)[0].copies) == 1


def test_copies_at_once_make_one_release(dev, prod):
    processes = [FORK.Process(target=_copy, args=(f"{dev}/small@1.0", prod)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert small.kept(Path(prod.url)) == small.kept(dev)


def test_read_whole_rejects_a_document_that_is_too_large(dev, made):
    entry = read(made).manifest.files[small.WEIGHTS].model_copy(update={"size": 1 << 40})
    with pytest.raises(CorruptError, match="too large"):
        read_whole(Origin(open_store(str(dev)), "small", "1.0"), small.WEIGHTS, entry)
