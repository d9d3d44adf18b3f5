"""Buckets of a histogram, against all choices, and the division of a budget between two kinds."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, product

import pytest

from pipeline.measure.buckets import best_buckets, divide, padded


def lengths_of(seed: int, longest: int) -> Counter[int]:
    rng = random.Random(seed)
    return Counter(rng.choice([rng.randint(1, 60), rng.randint(1, longest + 20)]) for _ in range(rng.randint(1, 40)))


@pytest.mark.parametrize("seed", range(40))
def test_best_buckets_are_those_of_brute_force(seed):
    """Over all sets of multiples; with the longest no multiple in every second case."""
    longest, multiple = 160 + seed % 2 * 7, 16
    lengths = lengths_of(seed, longest)
    found = best_buckets(lengths, longest, 5, multiple)
    others = range(multiple, longest, multiple)
    for count in range(1, 6):
        best = min(padded(lengths, [*chosen, longest]) for chosen in combinations(others, count - 1))
        buckets = found[min(count, len(found)) - 1]
        assert padded(lengths, buckets) == best
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == longest


@pytest.mark.parametrize("seed", range(20))
def test_best_buckets_never_pad_more_than_powers_of_two_or_fewer_buckets(seed):
    longest = 1024
    lengths = lengths_of(seed, longest)
    found = best_buckets(lengths, longest, 6, 32)
    tokens = [padded(lengths, buckets) for buckets in found]
    assert tokens == sorted(tokens, reverse=True)
    for count in range(1, 7):
        powers = [longest >> shift for shift in reversed(range(count))]
        assert tokens[min(count, len(tokens)) - 1] <= padded(lengths, powers)


def test_best_buckets_of_many_lengths_take_little_time():
    """4,096 possible buckets: the plain recurrence needs 8 million steps for each number of buckets."""
    lengths = Counter({length: 1 + length % 7 for length in range(1, 131_073)})
    found = best_buckets(lengths, 131_072, 8, 32)
    assert [len(buckets) for buckets in found] == list(range(1, 9))


@pytest.mark.parametrize("seed", range(30))
def test_divide_is_the_best_division(seed):
    """Of equal costs the one with fewest graphs, by trying all."""
    rng = random.Random(seed)
    costs = tuple(sorted((rng.randint(0, 30) for _ in range(rng.randint(1, 6))), reverse=True) for _ in range(2))
    graphs, budget = (rng.randint(1, 4), rng.randint(1, 12)), rng.randint(5, 60)
    fits = [
        (costs[0][a] + costs[1][b], graphs[0] * (a + 1) + graphs[1] * (b + 1))
        for a, b in product(range(len(costs[0])), range(len(costs[1])))
        if graphs[0] * (a + 1) + graphs[1] * (b + 1) <= budget
    ]
    found = divide(costs, graphs, budget)
    if found is None:
        assert not fits
    else:
        a, b = found
        assert (costs[0][a - 1] + costs[1][b - 1], graphs[0] * a + graphs[1] * b) == min(fits)
