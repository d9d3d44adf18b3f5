"""Choice of buckets: the few that pad a set of lengths least. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

WORTH = 0.02
"""Share of all tokens that a further bucket must save to be worth the compile time of its graphs."""


def padded(lengths: Sequence[int], buckets: Sequence[int]) -> int:
    """Return the tokens run when each length takes its smallest bucket, and longer ones the largest."""
    return sum(next((bucket for bucket in buckets if bucket >= length), buckets[-1]) for length in lengths)


def buckets_for(lengths: Sequence[int], longest: int, most: int, multiple: int) -> list[int]:
    """Return the fewest buckets worth their compile time: at most `most`, multiples of `multiple`, and `longest`."""
    buckets = [longest]
    total = sum(min(length, longest) for length in lengths) or 1
    for count in range(2, most + 1):
        better = _best(lengths, longest, count, multiple)
        if padded(lengths, buckets) - padded(lengths, better) > WORTH * total:
            buckets = better
    return buckets


def _best(lengths: Sequence[int], longest: int, count: int, multiple: int) -> list[int]:
    """Return the `count` buckets that pad least, by dynamic programming over the multiples."""
    steps = [0, *range(multiple, longest, multiple), longest]
    within = [sum(1 for n in lengths if low < min(n, longest) <= high) for low, high in pairwise(steps)]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # last bucket -> tokens so far, buckets
    for _ in range(count):
        extended = dict(best)
        for end in range(1, len(steps)):
            for start, (tokens, chosen) in best.items():
                if start >= end:
                    continue
                whole = tokens + steps[end] * sum(within[start:end])
                if end not in extended or whole < extended[end][0]:
                    extended[end] = (whole, [*chosen, steps[end]])
        best = extended
    return best[len(steps) - 1][1]
