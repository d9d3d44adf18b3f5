"""A published artifact, a copy of its registry to spoil, and folders to pull into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.artifact.signing import signature_over
from pipeline.registry.archives import save
from pipeline.registry.publish import Place, PublishSettings, publish
from support import small_artifacts as small


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    made = small.make_validated(folder / "out", folder / "work", size=2_000_000)
    publish(made.root, str(folder / "registry"), ["latest"])
    return folder


@pytest.fixture
def original(published: Path) -> Path:
    return published / "out"


@pytest.fixture
def registry(tmp_path: Path, published: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(published / "registry", tmp_path / "registry"))


@pytest.fixture
def options(tmp_path: Path) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, validated: Path) -> Path:
    """A folder with the signed release 1.0 in the registry `dev`, its keys, and the file `release.tar`."""
    pytest.importorskip("model_signing")
    from support.signing_keys import key_pair

    folder = tmp_path_factory.mktemp("saved")
    private, _ = key_pair(folder, "release")
    sign = PublishSettings(version="1.0", sign=lambda data: signature_over(data, "release", private, None, None))
    publish(Path(shutil.copytree(validated, folder / "out")), str(folder / "dev"), ["latest"], sign)
    save(f"{folder}/dev/small@latest", folder / "release.tar")
    return folder


@pytest.fixture
def file(tmp_path: Path, saved: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copy(saved / "release.tar", tmp_path))


@pytest.fixture
def air(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "air"))
