"""Prompts of the gates: JSON lines with `class`, `prompt` and optionally `id` (default: the line number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pipeline.errors import InputError
from pipeline.files.home import expanded
from pipeline.files.json_lines import Line, LineRecord, each_of, read_json_lines
from pipeline.recipe.schema import Recipe

DEFAULT = "prompts/default.jsonl"
FIX = 'write one JSON object per line, with "class", "prompt" and optionally "id"'
SHIPPED = Path(__file__).parent / "default_prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt and the class that its measurements are grouped by."""

    id: str
    kind: str
    text: str


class _PromptLine(LineRecord):
    id: str | int = ""
    kind: str = Field(alias="class")
    prompt: str


def prompts_path(name: str, base: Path) -> Path:
    """Return the prompt file of a recipe in the folder `base`; the shipped file if the default one is missing."""
    own = base / expanded(name)
    return SHIPPED if name == DEFAULT and not own.is_file() else own


def load_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file.

    Raises:
        InputError: no such file, no prompts, or a line that is not a prompt; names file, line and column.

    """
    lines = read_json_lines(path, _PromptLine, fix=FIX, missing="correct validate.prompts in the recipe")
    prompts = each_of(lines, _prompt)
    _check_ids(prompts, lines)
    return prompts


def recipe_prompts(recipe: Recipe, base: Path) -> list[Prompt]:
    """Read the prompts of a recipe in the folder `base`.

    Raises:
        InputError: as `load_prompts`; a missing file is an error at the recipe's key.

    """
    path = prompts_path(recipe.validate_.prompts, base)
    if not path.is_file():
        what = f"no such file: {path}"
        raise InputError(what, where=recipe.place("validate.prompts"), fix="correct the path, relative to the recipe")
    return load_prompts(path)


def _prompt(line: Line[_PromptLine]) -> Prompt:
    fields = line.fields
    if not fields.prompt.strip():
        raise line.place.error("empty prompt", "remove the line", key="prompt")
    id_ = fields.id if "id" in fields.model_fields_set else line.place.number
    return Prompt(str(id_), fields.kind, fields.prompt)


def _check_ids(prompts: Sequence[Prompt], lines: Sequence[Line[_PromptLine]]) -> None:
    """Reject two prompts with one id: answers and references are stored by id."""
    numbers: dict[str, int] = {}
    for prompt, line in zip(prompts, lines, strict=True):
        first = numbers.setdefault(prompt.id, line.place.number)
        if first != line.place.number:
            what = f"duplicate id: {prompt.id!r}, also in line {first}"
            raise line.place.error(what, "give every prompt its own `id`", key="id")
