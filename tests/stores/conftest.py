"""A small artifact to publish, and folders to pull it into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import small_artifacts as small


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    return small.make_validated(folder / "out", folder / "work", size=200_000).root


@pytest.fixture
def made(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


@pytest.fixture
def options(tmp_path: Path) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache"}
