"""Checkpoints in a folder on this host: `models/llama`, relative to the recipe. Copies and reads nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.files.home import expanded
from pipeline.progress import Progress
from pipeline.sources.base import Fetched


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the folder itself; the digests of its files name its content."""
    del cache, progress  # nothing is fetched
    return Fetched(base / expanded(location))


def moving(location: str) -> bool:
    """Return False: sizes and times of the files show a change."""
    del location
    return False


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return None: a folder has no revision apart from its files."""
    del location, timeout_s
    return None
