"""Find the recipes that a change of files affects: by their own files, their locks, and the files that they name.

Reads only recipes. A recipe that does not load counts as changed, so that a build shows its error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import InputError, no_string
from pipeline.recipe.document import read
from pipeline.recipe.read import load


def changed_recipes(paths: Iterable[str], root: Path = Path("recipes")) -> list[str]:
    """Return the names of the recipes in `root` that a change of these paths (as git prints them) affects.

    Raises:
        InputError: `paths` is one string.

    """
    no_string(paths, "paths", "paths")
    changed = [PurePosixPath(path) for path in paths]
    return sorted(recipe.stem for recipe in root.glob("*.yaml") if _is_affected(recipe, changed))


def _is_affected(recipe: Path, changed: list[PurePosixPath]) -> bool:
    named = [PurePosixPath(path.as_posix()) for path in _files_of(recipe)]
    return any(path == file or file in path.parents for path in changed for file in named)


def _files_of(recipe: Path) -> Iterator[Path]:
    """Yield the recipe, its lock, its base, and those of its folders and prompts that are paths relative to it."""
    yield recipe
    yield recipe.with_suffix(".lock")
    try:
        base = read(recipe).data.get("base")
        if isinstance(base, str):
            yield recipe.parent / base
        parsed = load(recipe)
    except InputError:
        yield recipe.parent  # any file in this folder can be the cause
        return
    for source in (parsed.target.source, parsed.draft.source, parsed.validate_.prompts):
        if source is not None and "://" not in source:
            yield Path(PurePosixPath(recipe.parent / source))
