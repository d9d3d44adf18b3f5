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
    if Path(name).is_dir():
        what = "not an artifact: expected a folder with manifest.json, which `tandem build` or `tandem pull` writes"
        raise InputError(what, where=name, fix=f"name an artifact's folder; {_known()}")
    places = [name, f"{ARTIFACTS / name}"] if Path(name).name == name else [name]
    what = f"no artifact {name!r}: no folder {' or '.join(f'`{place}`' for place in places)}"
    has_recipe = (RECIPES / f"{name}.yaml").is_file()
    fix = f"tandem build {name}" if has_recipe else f"name an artifact's folder; {_known()}"
    raise InputError(what, where="ARTIFACT", fix=fix)


def _known() -> str:
    """Return the artifacts in the folder of artifacts, for a fix."""
    built = sorted(path.parent.name for path in ARTIFACTS.glob("*/manifest.json"))
    return f"in {ARTIFACTS}/: {', '.join(built) or 'none'}"


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
