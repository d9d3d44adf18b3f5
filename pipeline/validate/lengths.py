"""Lengths of prompts in tokens, and the warning about prompts that fit no prefill graph. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import no_string
from pipeline.files.atomic import disk_errors
from pipeline.runtime.text import Text
from pipeline.validate.prompts import Prompt


def token_counts(prompts: Sequence[Prompt], tokenizer: Mapping[str, bytes]) -> list[int]:
    """Return the number of tokens of each prompt, by the tokenizer files of an artifact that is not built yet."""
    return [len(tokens) for tokens in encoded_prompts(prompts, tokenizer)]


def encoded_prompts(prompts: Sequence[Prompt], tokenizer: Mapping[str, bytes]) -> list[list[int]]:
    """Return the tokens of each prompt, by the tokenizer files of an artifact that is not built yet."""
    no_string(prompts, "prompts", "prompts")
    with tempfile.TemporaryDirectory(prefix="tandem-tokenizer-") as folder, disk_errors(Path(folder)):
        for name, data in tokenizer.items():
            (Path(folder) / name).write_bytes(data)
        text = Text(Path(folder))
    return [text.encode_prompt(prompt.text) for prompt in prompts]


def cut_warning(counts: Sequence[int], longest: int) -> str | None:
    """Return a warning with its remedy if prompts of these token counts exceed the largest prefill bucket, or None."""
    cut = [count for count in counts if count > longest]
    if not cut:
        return None
    what = f"{len(cut)} of {len(counts)} prompts are longer than the largest prefill bucket"
    fix = f"add a prefill bucket of {max(cut)} to the recipe, or shorten the prompts"
    return f"warning: {what}; only their last {longest} tokens run; {fix}"
