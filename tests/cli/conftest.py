"""A folder where commands run."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from support.commands import RECIPE
from support.families import write_tokenizer


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with a good recipe and its target, where commands run; nothing is cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_checkpoint(tmp_path / "target", vocab_size=400)
    write_tokenizer(tmp_path / "target", "json")
    return tmp_path
