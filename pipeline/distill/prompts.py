"""Prompts for training, which the target writes itself, and the filter that excludes prompts of the gates.

A chat model whose input ends where a user's message begins continues with such a message (Xu et al. 2024, Magpie), so
every chat model has a prompt set. Some prompts start with given words, so that the set has code, JSON and summaries.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import SourceError, no_string
from pipeline.files.json_lines import Fields, Line, LineRecord, read_json_lines
from pipeline.runtime.text import Text

SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}"
SHINGLE_WORDS = 8
"""A training prompt is dropped if it has this many consecutive words in common with a prompt of the gates."""

OPENINGS = (
    *("",) * 10,
    "Write a Python function",
    "Write a short Python program",
    "Write a JavaScript function",
    "Write a SQL query",
    "Write a shell script",
    "Write a function in C",
    "Explain this code:",
    "Fix this code:",
    "Write a test for",
    "Return a JSON object",
    "Give me a JSON list",
    "Convert the following to JSON:",
    "Extract the fields as JSON:",
    "Write a configuration file",
    "Make a table of",
    "Summarize the following text:",
    "Summarize this in one sentence:",
    "Give the main points of this text:",
    "Write a headline for",
    "Rewrite this text so that it is shorter:",
    "Write a story about",
    "Write a poem about",
    "Describe",
    "Imagine",
    "Write a dialogue between",
    "Write a letter to",
    "How do I",
    "What should I",
    "Can you explain",
    "Give me three tips",
    "What is the difference between",
    "Help me plan",
)
"""First words of the prompts that the target writes; a quarter has none."""


def user_turn(text: Text) -> tuple[str, str]:
    """Return the chat template's text before a user message, and after it up to the answer.

    Raises:
        SourceError: the target has no chat template, so it cannot write prompts.

    """
    if not text.has_chat:
        what = "the target cannot write prompts, because it has no chat template"
        raise SourceError(what, where="distill", fix="add a prompt file: --prompts FILE")
    before, after = text.chat_text(SENTINEL).split(SENTINEL)
    return before, after


def opening(seed: int) -> str:
    """Return the first words of the prompt with this seed."""
    return random.Random(seed).choice(OPENINGS)  # noqa: S311 - variety, not secrecy


class PromptLine(LineRecord):
    """A line of a file of prompts."""

    prompt: str


class TranscriptLine(PromptLine):
    """A line of a file of transcripts."""

    answer: str


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file of JSON lines.

    Raises:
        InputError: as `read_json_lines`.

    """
    return [line.fields.prompt for line in _lines(path, PromptLine)]


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Return prompt and answer of every line of a file of JSON lines.

    Raises:
        InputError: as `read_json_lines`.

    """
    return [(line.fields.prompt, line.fields.answer) for line in _lines(path, TranscriptLine)]


def _lines(path: Path, record: type[Fields]) -> list[Line[Fields]]:
    keys = " and ".join(f'"{key}"' for key in record.model_fields)
    return read_json_lines(path, record, fix=f"write one JSON object per line, with {keys}", missing="check the path")


class HeldOutFilter:
    """Decides which prompts may be trained on: those without text in common with held-out prompts."""

    def __init__(self, held_out: Iterable[str]) -> None:
        no_string(held_out, "held_out", "prompts")
        self._known = {shingle for text in held_out for shingle in _shingles(text)}

    def __call__(self, prompt: str) -> bool:
        """Return whether a prompt may be trained on."""
        return not self._known.intersection(_shingles(prompt))


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    size = min(SHINGLE_WORDS, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()
