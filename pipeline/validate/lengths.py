"""Lengths of prompts in tokens, and the warning about prompts that do not fit the caches. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import no_string
from pipeline.files.atomic import disk_errors
from pipeline.files.unfinished import work_folder
from pipeline.recipe.schema import Shapes
from pipeline.runtime.text import Text
from pipeline.validate.prompts import Prompt


def token_counts(prompts: Sequence[Prompt], tokenizer: Mapping[str, bytes]) -> list[int]:
    """Return the number of tokens of each prompt, by the tokenizer files of an artifact that is not built yet."""
    return [len(tokens) for tokens in encoded_prompts(prompts, tokenizer)]


def encoded_prompts(prompts: Sequence[Prompt], tokenizer: Mapping[str, bytes]) -> list[list[int]]:
    """Return the tokens of each prompt, by the tokenizer files of an artifact that is not built yet."""
    no_string(prompts, "prompts", "prompts")
    with work_folder("tokenizer") as folder, disk_errors(folder):
        for name, data in tokenizer.items():
            (folder / name).write_bytes(data)
        text = Text(folder)
    return [text.encode_prompt(prompt.text) for prompt in prompts]


def longest_prompt(shapes: Shapes, new_tokens: int) -> int:
    """Return the tokens of the longest prompt that runs whole: the caches hold it and an answer of `new_tokens`."""
    return max(shapes.prefill[-1], shapes.kv[-1] - new_tokens)


def cut_warning(counts: Sequence[int], shapes: Shapes, new_tokens: int) -> str | None:
    """Return a warning with its remedy if prompts of these token counts do not run whole, or None."""
    longest = longest_prompt(shapes, new_tokens)
    cut = [count for count in counts if count > longest]
    if not cut:
        return None
    cache = f"a cache of {shapes.kv[-1]} positions with {new_tokens} new tokens"
    what = f"{len(cut)} of {len(counts)} prompts do not fit {cache}"
    fix = f"add a kv bucket of {max(cut) + new_tokens} to the recipe, or shorten the prompts"
    return f"warning: {what}; only their last {longest} tokens run; {fix}"
