"""Paths that start with `~`, in an account with or without a home."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError


def expanded(path: str | Path, where: str = "") -> Path:
    """Return a path with the home folder for its `~`.

    Raises:
        InputError: the account has no home, or there is no such account; `where` names the setting.

    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        what = f"no home folder is known for {Path(path).parts[0]!r}"
        raise InputError(what, where=where or str(path), fix="write the whole path, or set HOME") from error


def has_home() -> bool:
    """Return whether this account has a home folder: containers run accounts without one."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True
