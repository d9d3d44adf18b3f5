"""The artifact, recipe or part of an artifact that an argument names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import InputError, no_string
from pipeline.recipe import find

ARTIFACTS = Path("artifacts")
RECIPES = Path("recipes")


def artifact_dir(name: str) -> Path:
    """Return an artifact's directory, by path or by the name of its recipe.

    Raises:
        InputError: neither is an artifact.

    """
    for path in (Path(name), ARTIFACTS / name):
        if (path / "manifest.json").is_file():
            return path
    built = sorted(path.parent.name for path in ARTIFACTS.glob("*/manifest.json"))
    known = f"artifacts here: {', '.join(built) or 'none'}"
    fix = f"make build RECIPE={name}" if (RECIPES / f"{name}.yaml").is_file() else f"name an artifact's folder; {known}"
    raise InputError(f"no artifact {name!r}", where="artifacts", fix=fix)


def recipe_path(name: str) -> Path:
    """Return a recipe's file, by path or by its name.

    Raises:
        InputError: no such recipe.

    """
    return find(name, RECIPES)


def file_patterns(parts: Sequence[str]) -> list[str] | None:
    """Return patterns of paths for parts like `weights`; None for the whole artifact."""
    no_string(parts, "parts", "parts")
    return [part if any(c in part for c in "*?[/.") else f"{part}/*" for part in parts] or None
