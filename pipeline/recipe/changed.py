"""Which recipes a change touches: their own files, their locks, and what they name in the repository. Pure, but for
reading the recipes; a recipe that does not parse counts as changed, so that its error is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import RecipeError
from pipeline.recipe.schema import load


def changed_recipes(paths: Iterable[str], root: Path = Path("recipes")) -> list[str]:
    """Names of the recipes in `root` that changed paths, as git prints them, concern."""
    changed = [PurePosixPath(path) for path in paths]
    return sorted(recipe.stem for recipe in root.glob("*.yaml") if _touched(recipe, changed))


def _touched(recipe: Path, changed: list[PurePosixPath]) -> bool:
    named = [PurePosixPath(path.as_posix()) for path in _files_of(recipe)]
    return any(path == one or one in path.parents for path in changed for one in named)


def _files_of(recipe: Path) -> Iterator[Path]:
    """The recipe, its lock, its base, and its folders and prompts, where they are paths beside it."""
    yield recipe
    yield recipe.with_suffix(".lock")
    base = next((line for line in recipe.read_text().splitlines() if line.startswith("base:")), "")
    if base:
        yield recipe.parent / base.removeprefix("base:").split("#")[0].strip().strip("\"'")
    try:
        parsed = load(recipe)
    except RecipeError:
        yield recipe.parent  # whatever changed here may be the reason
        return
    for named in (parsed.target.source, parsed.draft.source, parsed.validate_.prompts):
        if named is not None and "://" not in named:
            yield Path(PurePosixPath(recipe.parent / named))
