"""YAML file -> Recipe: find the file, merge its base; the JSON Schema. `check.py` has the checks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, Problem
from pipeline.recipe.check import parse
from pipeline.recipe.document import Document, dotted, read
from pipeline.recipe.schema import BASE_DESCRIPTION, Recipe


def load(path: Path | str) -> Recipe:
    """Read a recipe, and merge it over the file that its key `base` names (one level).

    `path` is the file; text is also the name of a recipe in `recipes/`.

    Raises:
        RecipeError: every problem, each with file, line and key.
        InputError: no such file.

    """
    path = located(path)
    document = _with_base(path)
    recipe = parse(document)
    recipe.remember({dotted(key): f"{file}:{line}" for key, (file, line) in document.lines.items()}, str(path))
    return recipe


def _with_base(path: Path) -> Document:
    document = read(path)
    if "base" not in document.data:
        return document
    name = document.data.pop("base")
    where = document.place(("base",))
    if not isinstance(name, str):
        document.problems.append(Problem(where, f"found {name!r}, expected a file name", "write base: other.yaml"))
        return document
    if not (path.parent / name).is_file():
        document.problems.append(Problem(where, f"no file {name!r} beside the recipe", "check the name"))
        return document
    base = read(path.parent / name)
    if "base" in base.data:
        del base.data["base"]
        what = "the base file has a key `base`; only one level is supported"
        base.problems.append(Problem(base.place(("base",)), what, "merge the two base files"))
    return document.over(base)


def located(recipe: Path | str) -> Path:
    """Return the file of a recipe that is given as a path, or as text: a path, or a name in `recipes/`.

    Raises:
        InputError: no such recipe of this name.

    """
    return find(recipe) if isinstance(recipe, str) else recipe


def find(name: str, root: Path = Path("recipes")) -> Path:
    """Return the file of a recipe given by name, in `root` or in the working directory, or by path.

    Raises:
        InputError: no such recipe; names the recipes in `root`.

    """
    for path in (root / f"{name}.yaml", Path(name), Path(f"{name}.yaml")):
        if path.is_file():
            return path
    names = sorted(path.stem for path in root.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, 1)
    listed = f"use a path, or one of: {', '.join(names)}" if names else f"no recipes in {root}/ here; use a path"
    fix = f"did you mean {near[0]!r}?" if near else listed
    raise InputError(f"no recipe {name!r}", where=str(root), fix=fix)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors."""
    recipe = Recipe.model_json_schema(by_alias=True)
    base = {"type": "string", "title": "Base", "description": BASE_DESCRIPTION}
    properties = {"base": base, **recipe["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "properties": properties}
