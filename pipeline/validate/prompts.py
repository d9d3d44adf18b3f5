"""Prompts of the gates: JSON lines with `class`, `prompt` and optionally `id` (default: the line number)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.files.home import expanded

DEFAULT = "prompts/default.jsonl"
FIX = 'write one JSON object per line, with "class", "prompt" and optionally "id"'
SHIPPED = Path(__file__).parent / "default_prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt and the class that its measurements are grouped by."""

    id: str
    kind: str
    text: str


def prompts_path(name: str, base: Path) -> Path:
    """Return the prompt file of a recipe in the folder `base`; the shipped file if the default one is missing."""
    own = base / expanded(name)
    return SHIPPED if name == DEFAULT and not own.is_file() else own


def load_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file.

    Raises:
        InputError: no such file, no prompts, or a line that is not a prompt; names file and line.

    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(
            f"cannot read prompts: {error.strerror}", where=str(path), fix="correct validate.prompts in the recipe"
        ) from error
    prompts = {number: _prompt(line, number, path) for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise InputError("no prompts", where=str(path), fix=FIX)
    _check_ids(prompts, path)
    return list(prompts.values())


def _prompt(line: str, number: int, path: Path) -> Prompt:
    where = f"{path}:{number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where, fix=FIX) from error
    if not isinstance(entry, dict):
        raise InputError("not a JSON object", where=where, fix=FIX)
    missing = [key for key in ("class", "prompt") if key not in entry]
    if missing:
        raise InputError(f"missing key: {', '.join(f'`{key}`' for key in missing)}", where=where, fix=FIX)
    prompt = Prompt(str(entry.get("id", number)), str(entry["class"]), str(entry["prompt"]))
    if not prompt.text.strip():
        raise InputError("empty prompt", where=where, fix="remove the line")
    return prompt


def _check_ids(prompts: Mapping[int, Prompt], path: Path) -> None:
    """Reject two prompts with one id: answers and references are stored by id."""
    lines: dict[str, int] = {}
    for number, prompt in prompts.items():
        first = lines.setdefault(prompt.id, number)
        if first != number:
            what = f"duplicate id: {prompt.id!r}, also in line {first}"
            raise InputError(what, where=f"{path}:{number}", fix="give every prompt its own `id`")
