"""Registries that lie: manifests, sizes, paths and links that pulling refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.errors import ArtifactError, HostError
from pipeline.registry.pull import pull
from support import small_artifacts as small


def spoil(registry: Path, change) -> None:
    """Rewrite a release's manifest, as a registry that lies would."""
    manifest = next(registry.glob("releases/small/*/manifest.json"))
    data = json.loads(manifest.read_text())
    change(data)
    manifest.write_text(json.dumps(data))


def test_pull_a_million_files(registry, options):
    """Refused by their number, before a byte is fetched or a folder made."""

    def many(data) -> None:
        entry = data["files"]["recipe.yaml"]
        data["files"] |= {f"f{number}": entry for number in range(200_001)}

    spoil(registry, many)
    with pytest.raises(ArtifactError, match="files"):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()


def test_pull_a_manifest_that_fills_the_memory(registry, options):
    manifest = next(registry.glob("releases/small/*/manifest.json"))
    os.truncate(manifest, 1 << 40)  # a hole: a terabyte that takes no disk
    with pytest.raises(ArtifactError, match="object too large"):
        pull(f"{registry}/small@latest", **options)


def test_pull_a_size_that_is_not_there(registry, original, options):
    """A claim of 10 GB for a blob of a megabyte: what is there arrives, and is seen not to be it."""
    spoil(registry, lambda data: data["files"][small.WEIGHTS].update(size=10_000_000_000))
    with pytest.raises((ArtifactError, HostError), match=r"fewer bytes|bytes needed"):
        pull(f"{registry}/small@latest", **options)
    assert sum(path.stat().st_blocks * 512 for path in options["cache"].rglob("*") if path.is_file()) < 50_000_000


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"schema_version": 1}', b"\xff" * 100])
def test_pull_a_damaged_manifest(registry, options, data):
    next(registry.glob("releases/small/*/manifest.json")).write_bytes(data)
    with pytest.raises(ArtifactError):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()


@pytest.mark.parametrize(
    "place", ["manifest.json", "signature", "pulled.json", "recipe.yaml/x", "graphs", ".", "a//b", "a/./b"]
)
def test_pull_a_path_that_is_taken(registry, options, place):
    spoil(registry, lambda data: data["files"].update({place: data["files"]["recipe.yaml"]}))
    with pytest.raises(ArtifactError, match="path"):
        pull(f"{registry}/small@latest", **options)


def test_pull_into_a_link(registry, original, options, tmp_path):
    """A directory that is a link is replaced, never followed: what it leads to is left alone."""
    (tmp_path / "elsewhere").mkdir()
    options["directory"].symlink_to(tmp_path / "elsewhere")
    pull(f"{registry}/small@latest", **options)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert small.digests(options["directory"]) == small.digests(original)


def test_pull_linked_blob_in_the_local_store(registry, original, options, tmp_path):
    """A link planted in the local store must not be written through."""
    entry = read(original).manifest.files[small.WEIGHTS]
    place = options["cache"] / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
    place.parent.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    place.symlink_to(tmp_path / "precious")
    pull(f"{registry}/small@latest", **options)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (options["directory"] / small.WEIGHTS).is_symlink()
