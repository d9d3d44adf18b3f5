"""Write changed values into a recipe file: only if the result loads, and without a change of other lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.files.atomic import atomic_file
from pipeline.recipe.edit import read_text
from pipeline.recipe.read import load


@dataclass(frozen=True)
class Change:
    """A new value of a key; a key that the section lacks is added behind the key `behind`."""

    section: str
    key: str
    value: Any
    behind: str


def change_recipe(path: Path, changes: Sequence[Change], fix: str) -> None:
    """Replace values of a recipe file. `fix` is the edit that a user can make by hand.

    Raises:
        InputError: a value cannot be replaced, or the recipe does not load with the new values.

    """
    recipe = read_text(path)
    try:
        for change in changes:
            recipe.put(change.section, change.key, change.value, behind=change.behind)
        text = recipe.text()
    except InputError as error:
        raise InputError(error.what, where=str(path), fix=fix) from error
    try:
        _replace_file(path, text)
    except InputError as error:
        what = f"the recipe would not load with the new values: {error.what}"
        raise InputError(what, where=str(path), fix=fix) from error


def _replace_file(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
        file.flush()
        load(Path(file.name))
