"""Lookup in the answers of earlier requests: propose what followed the longest match with the last tokens.

Agents and templates ask for the same text again and again (Oliaro et al. 2024, SuffixDecoding; its reference
implementation is arctic_inference.suffix_decoding). An answer is found by tenants of its own only. Runs no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.artifact.manifest import PairManifest
from pipeline.errors import InputError

LONGEST = 64
"""Tokens of a match that are compared."""
CANDIDATES = 16
"""Newest places of a run of tokens that are compared."""
END = -1
"""Between two answers; no token."""


@dataclass
class _Answers:
    """Answers of one tenant, one behind the other, and the places after each run of tokens.

    `newest` has, by the hash of a run, the place after its newest occurrence, and `older`, by place, the place after
    the occurrence before it. Runs of the same hash are told apart by their tokens.
    """

    size: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    newest: dict[int, int] = field(default_factory=dict)
    older: array[int] = field(default_factory=lambda: array("i"))

    def add(self, tokens: Sequence[int]) -> None:
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.tokens.append(END)
        self.older.extend([END] * (len(tokens) + 1))
        for end in range(start + self.size, start + len(tokens)):
            key = hash(tuple(self.tokens[end - self.size : end]))
            self.older[end] = self.newest.get(key, END)
            self.newest[key] = end

    def longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the length of the longest match with the last tokens, and the place after it; (0, 0) without one."""
        best = place = 0
        end = self.newest.get(hash(tuple(tokens[-self.size :])), END)
        for _ in range(CANDIDATES):
            if end == END:
                break
            length = self._match(tokens, end)
            if length > best:
                best, place = length, end
            end = self.older[end]
        return (best, place) if best >= self.size else (0, 0)

    def _match(self, tokens: Sequence[int], end: int) -> int:
        most = min(LONGEST, len(tokens), end)
        return next((at for at in range(most) if tokens[-1 - at] != self.tokens[end - 1 - at]), most)


class EarlierAnswers:
    """Answers of ended requests in bounded memory: at most `most_tokens`, of which the older half is given up at once.

    A token takes about 150 bytes. `size`: tokens of the shortest match.
    """

    def __init__(self, most_tokens: int, size: int) -> None:
        self.most_tokens, self.size = most_tokens, size
        self._new: dict[str, _Answers] = {}
        self._old: dict[str, _Answers] = {}
        self._count = 0

    def add(self, tenant: str, tokens: Sequence[int]) -> None:
        """Keep the tokens of an answer, with those before it that a match may begin with."""
        if len(tokens) <= self.size:
            return
        if self._count + len(tokens) > self.most_tokens // 2:
            self._old, self._new, self._count = self._new, {}, 0
        kept = tokens[-max(self.most_tokens // 2, 1) :]
        self._new.setdefault(tenant, _Answers(self.size)).add(kept)
        self._count += len(kept)

    def find(self, tenant: str, tokens: Sequence[int], most: int) -> tuple[int, list[int]]:
        """Return the length of the longest match with the last tokens, and up to `most` tokens that followed it."""
        found = [each for each in (self._new.get(tenant), self._old.get(tenant)) if each is not None]
        matches = [(*answers.longest(tokens), answers) for answers in found]
        length, place, answers = max(matches, key=lambda match: match[0], default=(0, 0, None))
        if not length or answers is None:
            return 0, []
        following = answers.tokens[place : place + most].tolist()
        return length, following[: following.index(END)] if END in following else following


def check_remembered(manifest: PairManifest, tokens: int, where: str = "remember_tokens") -> None:
    """Check how many tokens of answers are to be kept, 0 for none.

    Raises:
        InputError: a negative number, or an artifact without prompt lookup, whose graphs drafts from answers need.

    """
    if tokens < 0:
        raise InputError(f"found {tokens}", where=where, fix="use 0 or more")
    if tokens and manifest.lookup is None:
        fix = "set speculation.lookup in the recipe, and build again"
        raise InputError("the artifact was built without prompt lookup", where=where, fix=fix)
