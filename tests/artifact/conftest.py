"""An artifact without a compiler, packaged and validated once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import small_artifacts as small


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return small.make_validated(folder / "out", folder / "work").root


@pytest.fixture
def made(tmp_path: Path, original: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "out"))
