"""Prompt lookup: propose the tokens that followed the last tokens at their previous occurrence.

Answers repeat their prompt and themselves: names, code, fields of a list (Saxena 2023, prompt lookup decoding; Oliaro
et al. 2024, SuffixDecoding, which uses a draft model where lookup has no match, as here). Runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Index of the last occurrence of every run of `size` tokens in one growing sequence."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def find(self, tokens: Sequence[int], size: int, most: int) -> list[int]:
        """Return up to `most` tokens that followed the previous occurrence of the last `size` tokens; [] without one.

        `tokens` is the whole sequence; it starts with the sequence of the previous call.
        """
        for end in range(max(self._indexed, size), len(tokens)):
            self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        start = self._ends.get(tuple(tokens[-size:]))
        return [] if start is None else list(tokens[start : start + most])
