"""Choice of buckets: those that pad a histogram of lengths least. Pure; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, product

from pipeline.models.weights import up_to

Histogram = Mapping[int, int]
"""Length in tokens -> number of times that it occurs."""

WORTH = 0.02
"""Share of all tokens that a further bucket must save to be worth the compile time of its graphs."""

PREFILL_MULTIPLE, KV_MULTIPLE = 32, 128
"""Buckets are multiples of these sizes, except the largest."""


def padded(lengths: Histogram, buckets: Sequence[int]) -> int:
    """Return the tokens run when each length takes its smallest bucket, and longer ones the largest."""
    return sum(
        count * next((bucket for bucket in buckets if bucket >= length), buckets[-1])
        for length, count in lengths.items()
    )


def buckets_for(lengths: Histogram, longest: int, most: int, multiple: int) -> list[int]:
    """Return the fewest buckets worth their compile time: at most `most`, multiples of `multiple`, and `longest`."""
    buckets, *more = best_buckets(lengths, longest, most, multiple)
    total = sum(min(length, longest) * count for length, count in lengths.items()) or 1
    for better in more:
        if padded(lengths, buckets) - padded(lengths, better) > WORTH * total:
            buckets = better
    return buckets


def best_buckets(lengths: Histogram, longest: int, most: int, multiple: int) -> list[list[int]]:
    """Return the buckets that pad least, for each number of buckets from 1 to `most`.

    Buckets are multiples of `multiple`, and the last is `longest`, which longer lengths take as well. The list is
    shorter than `most` if further buckets save nothing.

    Dynamic programming over the rounded lengths. With more lengths to cover, the best second-largest bucket never
    becomes smaller (the costs satisfy the quadrangle inequality, Yao 1980), so halving the range finds all of a row.
    """
    counts = {longest: 0}
    for length, count in lengths.items():
        end = min(up_to(length, multiple), longest)
        counts[end] = counts.get(end, 0) + count
    ends = sorted(counts)
    below = [0, *accumulate(counts[end] for end in ends)]
    tokens: list[float] = [0, *[math.inf] * len(ends)]  # of the lengths up to each end, with the buckets so far
    chosen: list[list[int]] = []  # by number of buckets: index behind the second-largest bucket, for each end
    for _ in range(min(most, len(ends))):
        tokens, previous = _with_one_more(tokens, ends, below, len(chosen))
        chosen.append(previous)
    return [_traced(ends, chosen[:count]) for count in range(1, len(chosen) + 1)]


def _with_one_more(
    tokens: Sequence[float], ends: Sequence[int], below: Sequence[int], buckets: int
) -> tuple[list[float], list[int]]:
    """Return the least tokens up to each end with one bucket more than `buckets`, and the index that it starts at."""
    best: list[float] = [math.inf] * len(tokens)
    previous = [0] * len(tokens)
    ranges = [(buckets + 1, len(ends), buckets, len(ends))]  # of the index to fill, and of the index it starts at
    while ranges:
        low, high, first, last = ranges.pop()
        if low > high:
            continue
        middle = (low + high) // 2
        size, count = ends[middle - 1], below[middle]
        best[middle], previous[middle] = min(
            (tokens[start] + size * (count - below[start]), start) for start in range(first, min(last, middle - 1) + 1)
        )
        ranges += [(low, middle - 1, first, previous[middle]), (middle + 1, high, previous[middle], last)]
    return best, previous


def _traced(ends: Sequence[int], chosen: Sequence[Sequence[int]]) -> list[int]:
    """Return the buckets that lead to the last end."""
    index, buckets = len(ends), []
    for previous in reversed(chosen):
        buckets.append(ends[index - 1])
        index = previous[index]
    return buckets[::-1]


def divide(
    costs: tuple[Sequence[float], Sequence[float]], graphs: tuple[int, int], budget: int
) -> tuple[int, int] | None:
    """Return the number of buckets of two kinds with the least sum of costs; of equal sums, that with fewest graphs.

    `costs` of 1, 2, ... buckets of a kind; `graphs` that one bucket of a kind needs; `budget` of graphs. None if the
    budget has no room for one bucket of each kind.
    """
    within = (
        (costs[0][first - 1] + costs[1][second - 1], graphs[0] * first + graphs[1] * second, first, second)
        for first, second in product(*(range(1, len(of) + 1) for of in costs))
        if graphs[0] * first + graphs[1] * second <= budget
    )
    best = min(within, default=None)
    return best and best[2:]
