"""Prompt lookup: what followed the last tokens where they occurred before is a guess of what follows them now.

Answers repeat their prompt and themselves: names, code, fields of a list (Saxena 2023, prompt lookup decoding; Oliaro
et al. 2024, SuffixDecoding, which lets a draft model guess where nothing is found, as here). No model runs for it.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Where each run of `size` tokens of one growing sequence occurred last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def find(self, tokens: Sequence[int], size: int, most: int) -> list[int]:
        """Up to `most` tokens that followed the last `size` ones before; none where those are new.

        `tokens` is the whole sequence, of which earlier calls saw the beginning.
        """
        for end in range(max(self._known, size), len(tokens)):
            self._ends[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        found = self._ends.get(tuple(tokens[-size:]))
        return [] if found is None else list(tokens[found : found + most])
