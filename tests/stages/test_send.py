"""Weights that a build sends to registries before the release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifact.manifest import FileEntry
from pipeline.errors import InputError
from pipeline.files.atomic import digest_file
from pipeline.recipe.schema import Publish
from pipeline.registry.publish import publish, send_ahead
from pipeline.registry.releases import list_releases
from pipeline.stages.background import Background
from pipeline.stages.send import check_registries, start_sending
from pipeline.stages.shard import Shards
from pipeline.stages.shard_files import ShardFile
from support import small_artifacts as small
from support import tiny_build as tiny


def settings_of(base: Path, *urls: str):
    request = tiny.request_in(base)
    recipe = request.recipe.model_copy(update={"publish": tuple(Publish(to=url) for url in urls)})
    return replace(request, recipe=recipe, send_weights=True)


@pytest.fixture
def shards(tmp_path) -> Shards:
    path = tmp_path / "shards/weights/target/rank-0-of-1.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    digest = digest_file(path)
    file = ShardFile(path.relative_to(tmp_path / "shards"), digest.sha256, digest.size, 0, "target")
    return Shards(tmp_path / "shards", (file,))


def blobs(registry: Path) -> set[str]:
    return {path.name for path in (registry / "blobs").rglob("*") if path.is_file()}


def test_shards_are_sent_to_each_registry(tmp_path, shards):
    lines = []
    settings = replace(settings_of(tmp_path, str(tmp_path / "a"), "hf://org", str(tmp_path / "b")), log=lines.append)
    with Background() as background:
        for wait in start_sending(background, settings, shards):
            wait()
    assert blobs(tmp_path / "a") == blobs(tmp_path / "b") == {shards.files[0].sha256}
    assert lines == [f"weights sent to {tmp_path / name}: 1 files, 0.00 GB" for name in "ab"]
    assert list(list_releases(str(tmp_path / "a"))) == []


def test_registry_that_fails_is_logged_and_fails_no_build(tmp_path, shards):
    (tmp_path / "file").write_text("no folder")
    lines = []
    settings = replace(settings_of(tmp_path, str(tmp_path / "file")), log=lines.append)
    with Background() as background:
        for wait in start_sending(background, settings, shards):
            wait()
        background.check()
    assert len(lines) == 1
    assert lines[0].startswith(f"weights not sent to {tmp_path / 'file'}: ")
    assert lines[0].endswith("; `tandem publish` sends them")


@pytest.mark.parametrize("urls", [(), ("hf://org",)])
def test_recipe_without_such_a_registry_is_rejected(tmp_path, urls):
    with pytest.raises(InputError, match="lists no registry that takes weights before their release") as raised:
        check_registries(settings_of(tmp_path, *urls))
    assert raised.value.where == "--send-weights"


def test_publish_sends_only_what_was_not_sent_ahead(tmp_path):
    made = small.make_validated(tmp_path / "out", tmp_path / "work")
    weights = {name: entry for name, entry in made.manifest.files.items() if name.startswith("weights/")}
    url, sizes = str(tmp_path / "registry"), []
    assert sorted(send_ahead(url, made.root, weights, sizes.append)) == sorted(weights)
    assert sorted(sizes) == sorted(entry.size for entry in weights.values())
    assert send_ahead(url, made.root, weights, sizes.append) == []
    release = publish(made.root, url)
    distinct = {entry.sha256 for entry in made.manifest.files.values()}
    assert release.sent == len(distinct - {entry.sha256 for entry in weights.values()})


def test_file_that_differs_from_its_digest_is_not_stored(tmp_path):
    (tmp_path / "shard").write_bytes(b"altered")
    files = {"shard": FileEntry(sha256="0" * 64, size=7)}
    with pytest.raises(Exception, match="sha256 mismatch"):
        send_ahead(str(tmp_path / "registry"), tmp_path, files, lambda size: None)
    assert blobs(tmp_path / "registry") == set()
