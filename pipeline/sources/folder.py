"""Checkpoints in a folder on this host: `models/llama`, relative to the recipe. Copies and reads nothing."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.files.home import expanded
from pipeline.progress import Progress
from pipeline.sources.base import Fetched

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)
"""The end of a path that may be the name of a repository on the Hub, `org/name`."""
PATHS = (".", "/", "~")
"""Starts of a location that can only be a path."""


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the folder itself; the digests of its files name its content.

    Raises:
        SourceError: no such folder, of a location that can only be a path. Others: see `open_checkpoint`.

    """
    del cache, progress  # nothing is fetched
    return Fetched(located(location, base))


def located(location: str, base: Path) -> Path:
    """Return the path of a folder; raise as `fetch`."""
    root = base / expanded(location)
    if location.startswith(PATHS) and not root.is_dir():
        raise SourceError("no such folder", where=str(root), fix=other_folder(root, may_be_hub=False))
    return root


def other_folder(root: Path, *, may_be_hub: bool = True) -> str:
    """Return the fix for a missing folder: one with a similar path, the Hub's address, or what a folder has."""
    if (near := _near(root)) is not None:
        return f"did you mean {near}?"
    like_hub = HUB_NAME.search(str(root)) if may_be_hub else None
    if like_hub and not root.parent.exists():
        return f"for the Hub, write hf://{like_hub[0]}@REVISION; for a folder, check the path"
    return "give a folder with config.json and *.safetensors"


def _near(root: Path) -> Path | None:
    """Return a folder whose path differs from a missing one by similar names; None if there is none."""
    parent = next((folder for folder in root.parents if folder.is_dir()), None)
    if parent is None or not os.access(parent, os.R_OK | os.X_OK):
        return None
    missing, *below = root.relative_to(parent).parts
    names = [path.name for path in parent.iterdir() if path.is_dir()]
    for name in difflib.get_close_matches(missing, names, 3):
        folder = parent.joinpath(name, *below)
        if (found := folder if folder.is_dir() else _near(folder)) is not None:
            return found
    return None


def moving(location: str) -> bool:
    """Return False: sizes and times of the files show a change."""
    del location
    return False


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return None: a folder has no revision apart from its files."""
    del location, timeout_s
    return None
