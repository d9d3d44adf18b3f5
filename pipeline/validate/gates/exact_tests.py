"""Exact tests of sampled tokens, for each graph and for all speculate graphs together. Runs no graph.

Together the tests fail a correct artifact with probability `FALSE_ALARM` at most: each has an equal share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.validate.gates.judge import SETTINGS, words
from pipeline.validate.report.schema import ExactTest

FALSE_ALARM = 1e-4
"""Probability that a correct artifact fails this gate, over all its tests."""

BINS = 10
LEAST = 25
"""A group with fewer tokens is not tested."""


@dataclass
class Drawn:
    """Sampled tokens of one graph with the target's ranks in [0, 1], and the samples with q > p (`liked`).

    `tokens` counts all of them; the lists leave out those that had no alternative.
    """

    graph: str
    tokens: int = 0
    index: list[int] = field(default_factory=list)
    """Index of each token in its step."""
    settings: list[int] = field(default_factory=list)
    """Index of each token's settings in `judge.SETTINGS`."""
    ranks: list[float] = field(default_factory=list)
    liked: list[bool] = field(default_factory=list)
    """Whether q > p: the draft gives the token a higher probability than the target."""
    chance: list[float] = field(default_factory=list)
    """The target's probability of all tokens with q > p."""
    faults: list[str] = field(default_factory=list)
    """Findings that no chance explains."""
    borders: int = 0
    """Number of tokens outside top-k or top-p."""

    def add(self, other: Drawn, setting: int | None = None) -> None:
        """Add the tokens of another graph, all or those of one setting."""
        chosen = [at for at, of in enumerate(other.settings) if setting in (None, of)]
        for name in ("index", "settings", "ranks", "liked", "chance"):
            values = getattr(other, name)
            getattr(self, name).extend(values[at] for at in chosen)


def exact_tests(drawn: Sequence[Drawn]) -> tuple[list[ExactTest], float]:
    """Return all tests, and the p-value under which one of them fails.

    Groups of several graphs detect smaller deviations: all speculate graphs, all prefill graphs, and each setting.
    """
    speculate = [of for of in drawn if max(of.index, default=0) > 0]
    prefill = [of for of in drawn if of.graph.startswith("prefill")]
    groups = [*drawn, _together("all speculate graphs", speculate), _together("all prefill graphs", prefill)]
    groups += [_together(words(choice), drawn, number) for number, choice in enumerate(SETTINGS)]
    share = FALSE_ALARM / (4 * max(len(groups), 1))
    return [test for group in groups for test in _tests(group, share)], share


def _together(name: str, drawn: Sequence[Drawn], setting: int | None = None) -> Drawn:
    """Return the tokens of several graphs as one group."""
    whole = Drawn(name)
    for of in drawn:
        whole.add(of, setting)
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
        if not chance.any():  # no draft took part
            continue
        p_value = poisson_binomial_p(int(torch.tensor(drawn.liked)[chosen].sum()), chance)
        shift = detectable_shift(chance, share)
        yield ExactTest(graph=drawn.graph, test=f"draft, {name}", tokens=size, p_value=p_value, shift=shift)


def chi_square_uniform(ranks: Tensor) -> float:
    """Return the p-value of uniformity over equal bins."""
    expected = len(ranks) / BINS
    seen = torch.histc(ranks.clamp(0, 1), BINS, 0.0, 1.0)
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2).double(), statistic / 2))


def poisson_binomial_p(seen: int, chance: Tensor) -> float:
    """Return the two-sided p-value of a sum of independent Bernoulli draws, by convolution: twice the smaller tail."""
    mass = torch.zeros(len(chance) + 1, dtype=torch.float64)
    mass[0] = 1.0
    for p in chance.tolist():
        mass[1:] = mass[1:] * (1 - p) + mass[:-1] * p
        mass[0] *= 1 - p
    tails = float(mass[: seen + 1].sum()), float(mass[seen:].sum())
    return min(2 * min(tails), 1.0)


def detectable_shift(chance: Tensor, false_alarm: float) -> float:
    """Return the shift of probability to the draft's tokens that the draft test detects in nine of ten artifacts."""
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    needed = float(quantile(torch.tensor(1 - false_alarm / 2))) + float(quantile(torch.tensor(0.9)))
    return needed * float((chance * (1 - chance)).mean().clamp(min=0).sqrt()) / len(chance) ** 0.5
