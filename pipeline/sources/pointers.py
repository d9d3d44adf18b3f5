"""Files of a checkpoint that point to others: an index of weights, git-LFS pointers, an adapter. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import SourceError, no_string

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
LFS_LIMIT_BYTES = 1024
"""A pointer is smaller, by its specification."""

SHOWN_NAMES = 4


def reject_pointers(root: Path, names: Iterable[str]) -> None:
    """Raise an error for git-LFS pointers among the files of a checkpoint, and for an adapter beside its weights.

    Raises:
        SourceError: pointers, by name, or an adapter, which transformers would merge into the model.

    """
    no_string(names, "names", "file names")
    pointers = [name for name in names if is_pointer(root / name)]
    if pointers:
        more = f" and {len(pointers) - SHOWN_NAMES} more" if len(pointers) > SHOWN_NAMES else ""
        what = f"git-LFS pointer instead of the file: {', '.join(pointers[:SHOWN_NAMES])}{more}"
        raise SourceError(what, where=str(root), fix=f"run `git lfs pull` in {root}")
    if (root / ADAPTER).is_file():
        fix = "merge the adapter (`merge_and_unload()` of peft) and save the whole model, or remove the adapter's files"
        raise SourceError("adapters are not supported", where=str(root / ADAPTER), fix=fix)


def is_pointer(path: Path) -> bool:
    """Return whether a file is a git-LFS pointer: a text of three lines in the place of a large file."""
    if not path.is_file() or path.stat().st_size >= LFS_LIMIT_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_MAGIC)) == LFS_MAGIC


def unread_index(root: Path) -> str | None:
    """Return a warning if a folder has `model.safetensors` and an index: transformers and Tandem ignore the index."""
    if not ((root / SINGLE).is_file() and (root / INDEX).is_file()):
        return None
    what = f"{root}: {SINGLE} is read, as in transformers; {INDEX} and the files that it lists are ignored"
    return f"warning: {what}; remove those that are not the model"
