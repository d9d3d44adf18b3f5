"""Exact tests over tokens that a graph drew, of each graph and of all that speculate together. Runs no graph.

Together they fail a right artifact at most at `FALSE_ALARM`, since each gets an equal share of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.validate.report.schema import ExactTest

FALSE_ALARM = 1e-4
"""Probability that a right artifact fails this gate, over all its tests."""

BINS = 10
LEAST = 25
"""A group with fewer tokens is not tested."""


@dataclass
class Drawn:
    """Tokens of one graph with what the target makes of them: `ranks` in [0, 1], `liked` draws and probabilities."""

    graph: str
    index: list[int] = field(default_factory=list)
    """Index of each token in its step."""
    ranks: list[float] = field(default_factory=list)
    liked: list[bool] = field(default_factory=list)
    """Whether the draft likes the token more than the target does."""
    chance: list[float] = field(default_factory=list)
    """The target's probability of all tokens that the draft likes more."""
    excluded: list[str] = field(default_factory=list)
    borders: int = 0
    """Tokens from beyond top-k or top-p."""


def exact_tests(drawn: Sequence[Drawn]) -> tuple[list[ExactTest], float]:
    """Return all tests, and the p-value under which one of them fails."""
    speculative = [of for of in drawn if max(of.index, default=0) > 0]
    groups = [*drawn, *([_together(speculative)] if len(speculative) > 1 else [])]
    share = FALSE_ALARM / (4 * max(len(groups), 1))
    return [test for group in groups for test in _tests(group, share)], share


def _together(drawn: Sequence[Drawn]) -> Drawn:
    """Join the tokens of several graphs, which shows what is too small to be seen in one."""
    whole = Drawn("all that speculate")
    for of in drawn:
        whole.index += of.index
        whole.ranks += of.ranks
        whole.liked += of.liked
        whole.chance += of.chance
    return whole


def _tests(drawn: Drawn, share: float) -> Iterator[ExactTest]:
    """Yield tests of a step's first tokens, and of those that follow an accepted draft."""
    index = torch.tensor(drawn.index)
    for name, chosen in (("first", index == 0), ("later", index > 0)):
        size = int(chosen.sum())
        if size < LEAST:
            continue
        p_value = chi_square_uniform(torch.tensor(drawn.ranks, dtype=torch.float64)[chosen])
        yield ExactTest(graph=drawn.graph, test=f"rank, {name}", tokens=size, p_value=p_value, shift=None)
        chance = torch.tensor(drawn.chance, dtype=torch.float64)[chosen]
        p_value = poisson_binomial_p(int(torch.tensor(drawn.liked)[chosen].sum()), chance)
        shift = detectable_shift(chance, share)
        yield ExactTest(graph=drawn.graph, test=f"draft, {name}", tokens=size, p_value=p_value, shift=shift)


def chi_square_uniform(ranks: Tensor) -> float:
    """p-value of uniformity over equal bins."""
    expected = len(ranks) / BINS
    seen = torch.histc(ranks.clamp(0, 1), BINS, 0.0, 1.0)
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2).double(), statistic / 2))


def poisson_binomial_p(seen: int, chance: Tensor) -> float:
    """Two-sided p-value of a sum of independent Bernoulli draws, by convolution: twice the smaller tail."""
    mass = torch.zeros(len(chance) + 1, dtype=torch.float64)
    mass[0] = 1.0
    for p in chance.tolist():
        mass[1:] = mass[1:] * (1 - p) + mass[:-1] * p
        mass[0] *= 1 - p
    tails = float(mass[: seen + 1].sum()), float(mass[seen:].sum())
    return min(2 * min(tails), 1.0)


def detectable_shift(chance: Tensor, false_alarm: float) -> float:
    """Probability that must move towards the draft's tokens for the draft test to notice in nine of ten artifacts."""
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    needed = float(quantile(torch.tensor(1 - false_alarm / 2))) + float(quantile(torch.tensor(0.9)))
    return needed * float((chance * (1 - chance)).mean().clamp(min=0).sqrt()) / len(chance) ** 0.5
