"""A published artifact, a copy of its registry to spoil, and folders to pull into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.registry.publish import publish
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
