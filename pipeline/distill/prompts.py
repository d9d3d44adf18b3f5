"""Prompts to learn from, which the target writes itself, and how they are kept apart from those of the gates.

A chat model that is shown its template up to where a user speaks goes on as a user would (Xu et al. 2024, Magpie), so a
prompt set exists for every target. Some are given their first words, so that code, JSON and summaries are among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from pipeline.errors import SourceError
from pipeline.runtime.text import Text

SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}"
SHINGLE_WORDS = 8
"""A training prompt that shares this many words in a row with a prompt of the gates is dropped."""

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
    """The chat template around one user message: what comes before it, and after it up to the answer.

    Raises:
        SourceError: the target has no chat template, so it cannot write prompts itself.

    """
    if not text.has_chat:
        what = "the target has no chat template, so it cannot write prompts"
        raise SourceError(what, where="distill", fix="give a prompt file: --prompts FILE")
    before, after = text.chat_text(SENTINEL).split(SENTINEL)
    return before, after


def opening(seed: int) -> str:
    """First words of the prompt with this seed."""
    return random.Random(seed).choice(OPENINGS)  # noqa: S311 - variety, not secrecy


class HeldOutFilter:
    """Keeps training prompts apart from held-out ones."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self._known = {shingle for text in held_out for shingle in _shingles(text)}

    def __call__(self, prompt: str) -> bool:
        """Whether a prompt may be trained on."""
        return not self._known.intersection(_shingles(prompt))


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    size = min(SHINGLE_WORDS, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()
