"""Prompts that gates run on: JSON lines with `id`, `class` and `prompt`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

DEFAULT = "prompts/default.jsonl"
SHIPPED = Path(__file__).parent / "default_prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt and the class its figures are grouped by."""

    id: str
    kind: str
    text: str


def prompts_path(name: str, base: Path) -> Path:
    """The prompt file of a recipe in the folder `base`; the default one ships with Tandem unless there is one."""
    own = base / Path(name).expanduser()
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
            f"cannot read prompts: {error.strerror}", where=str(path), fix="see validate.prompts"
        ) from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError("no prompts", where=str(path), fix="add lines with id, class and prompt")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        data = json.loads(line)
        prompt = Prompt(str(data["id"]), str(data["class"]), str(data["prompt"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not a prompt: {error!r}", where=where, fix='write {"id", "class", "prompt"}') from error
    if not prompt.text.strip():
        raise InputError("empty prompt", where=where, fix="remove the line")
    return prompt
