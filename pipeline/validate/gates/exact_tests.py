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
    """Sampled tokens of one graph with the target's ranks in [0, 1].

    `tokens` counts all of them; the lists leave out those that had no alternative.
    """

    graph: str
    tokens: int = 0
    index: list[int] = field(default_factory=list)
    """Index of each token in its step."""
    settings: list[int] = field(default_factory=list)
    """Index of each token's settings in `judge.SETTINGS`."""
    ranks: list[float] = field(default_factory=list)
    left_out: list[float] = field(default_factory=list)
    """Probability, at temperature 1, of the tokens that the graph cannot sample; empty if it can sample all."""
    faults: list[str] = field(default_factory=list)
    """Findings that no chance explains."""
    borders: int = 0
    """Number of tokens outside top-k or top-p."""

    def add(self, other: Drawn, setting: int | None = None) -> None:
        """Add the tokens of another graph, all or those of one setting."""
        chosen = [at for at, of in enumerate(other.settings) if setting in (None, of)]
        for name in ("index", "settings", "ranks"):
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
    share = FALSE_ALARM / (2 * len(groups))
    return [test for group in groups for test in _tests(group)], share


def _together(name: str, drawn: Sequence[Drawn], setting: int | None = None) -> Drawn:
    """Return the tokens of several graphs as one group."""
    whole = Drawn(name)
    for of in drawn:
        whole.add(of, setting)
    return whole


def _tests(drawn: Drawn) -> Iterator[ExactTest]:
    """Yield tests of a step's first tokens, and of those that follow an accepted draft."""
    index = torch.tensor(drawn.index)
    for name, chosen in (("first", index == 0), ("later", index > 0)):
        size = int(chosen.sum())
        if size >= LEAST:
            p_value = chi_square_uniform(torch.tensor(drawn.ranks, dtype=torch.float64)[chosen])
            yield ExactTest(graph=drawn.graph, test=f"rank, {name}", tokens=size, p_value=p_value)


def chi_square_uniform(ranks: Tensor) -> float:
    """Return the p-value of uniformity over equal bins."""
    expected = len(ranks) / BINS
    seen = torch.histc(ranks.clamp(0, 1), BINS, 0.0, 1.0)
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2).double(), statistic / 2))
