"""Gate 2, stochastic: is what the shipped graphs draw distributed as the target says? Exact tests on every graph.

A graph generates at the end of its KV bucket; teacher forcing then gives, for every token drawn, the target's own
distribution p and the draft's q after the tokens before it. If the graph is right, then whatever those are:
- the *rank* test: a token's randomised place in the cumulative p is uniform on [0, 1] (Rosenblatt 1952). Chi-square.
- the *draft* test: tokens that the draft likes more than the target (q > p) come as often as p says. The count is a sum
  of independent Bernoulli draws of known probabilities, so its distribution is computed exactly, not approximated. It
  looks where acceptance fails: too easy, and these tokens come too often; no residual, and they come too often as well.
- no token comes that p excludes.
The tests look at a step's first token and at later ones apart. Together they fail a right artifact at most at
`FALSE_ALARM`, since each gets an equal share of it.

Shapes: T tokens drawn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.losslessness import Row, settings, step
from pipeline.validate.gates.scoring import score

FALSE_ALARM = 1e-4
"""Probability that a right artifact fails this gate, over all its tests."""

TEMPERATURE, TOP_K, TOP_P = 1.3, 12, 0.95
DRAWS = 160
"""Least tokens that a graph draws."""

BINS = 10
LEAST = 25
"""A group with fewer tokens is not tested."""

BORDER_SHARE = 0.05
"""Share of tokens that noise may let past the borders of top-k and top-p, and two more."""


@dataclass(frozen=True)
class ExactTest:
    """One test of one graph. `shift` is what it finds with 90% power: probability moved towards the draft's tokens."""

    graph: str
    test: str
    tokens: int
    p_value: float
    shift: float | None = None


@dataclass
class Drawn:
    """Tokens of one graph with what the target makes of them: `places` in [0, 1], `liked` draws and probabilities."""

    graph: str
    index: list[int] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    liked: list[bool] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    borders: int = 0


def draw(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], draft_ids: Tensor | None, tie: float) -> Drawn:
    """Let a graph generate up to the end of its bucket, whose caches hold the probes, and score what it drew.

    Short buckets are run through more than once. `draft_ids` are the target's ids of a reduced vocabulary; `tie` is
    the relative gap that noise closes between two logits.
    """
    usable = min(spec.kv, engine.length)
    size = min(-(-DRAWS // spec.batch), usable - 2)
    starts = [Row(list(probe[: usable - size + 1 - row % 2]), 0) for row, probe in enumerate(probes[: spec.batch])]
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.draft_tokens)
    for _ in range(-(-DRAWS // (spec.batch * size)) if size > 0 else 0):
        rows, indices = _generate(engine, spec, starts, usable, generator)
        begins = [row.start - 1 for row in rows]
        scored = [row.tokens[begin:-1] for row, begin in zip(rows, begins, strict=True)]
        target, draft = (
            score(
                engine,
                next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", m, spec.kv)),
                scored,
                begins,
            )
            for m in ("target", "draft")
        )
        for row, index, p, q in zip(rows, indices, target, draft, strict=True):
            _place(drawn, row.new, index, (p, q), draft_ids, engine.manifest.pair.candidates, generator, tie)
    return drawn


def _generate(
    engine: Engine, spec: GraphSpec, starts: Sequence[Row], usable: int, generator: torch.Generator
) -> tuple[list[Row], list[list[int]]]:
    """Rows driven to the end, and for each new token its index in the step that gave it."""
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    indices: list[list[int]] = [[] for _ in rows]
    step(engine, plain, [Row(row.tokens[:-1], 0) for row in rows], [True] * len(rows))
    how = settings(len(rows), TEMPERATURE, TOP_K, TOP_P)
    while any(active := [len(row.tokens) - 1 < usable for row in rows]):
        for row, index, new in zip(rows, indices, step(engine, spec, rows, active, how, generator), strict=True):
            row.tokens.extend(new)
            index.extend(range(len(new)))
    return rows, indices


def _place(
    drawn: Drawn, tokens: list[int], index: list[int], logits: tuple[Tensor, Tensor], draft_ids: Tensor | None,
    keep: int | None, generator: torch.Generator, tie: float,
) -> None:  # fmt: skip
    """Add the tokens of a row."""
    for at, token in enumerate(tokens):
        target_V, draft_D = (of[at] for of in logits)
        draft_D = draft_D[: len(target_V)]  # a draft never proposes what pads its vocabulary
        p = distribution(target_V, keep)
        q = distribution(draft_D, keep)
        if draft_ids is not None:
            q = {int(draft_ids[token_id]): share for token_id, share in q.items()}
        if token not in p:
            drawn.borders += 1
            if not _nearly_in(target_V, token, keep, tie):
                drawn.excluded.append(f"drew token {token}, which the target excludes")
            continue
        before = list(p).index(token)
        place = sum(list(p.values())[:before]) + p[token] * float(torch.rand((), generator=generator))
        drawn.index.append(index[at])
        drawn.places.append(place)
        drawn.liked.append(q.get(token, 0.0) > p[token])
        drawn.chance.append(sum(share for token_id, share in p.items() if q.get(token_id, 0.0) > share))


def distribution(logits_V: Tensor, keep: int | None) -> dict[int, float]:
    """What the test's settings make of logits: probability by token id, the likeliest first.

    Written apart from the graphs' own sampling.
    """
    best = (logits_V.double() / TEMPERATURE).topk(min(TOP_K, keep or TOP_K, len(logits_V)))
    probs = torch.softmax(best.values, 0)
    inside = min(int((probs.cumsum(0) < TOP_P).sum()) + 1, len(probs))
    shares = probs[:inside] / probs[:inside].sum()
    return dict(zip(best.indices[:inside].tolist(), shares.tolist(), strict=True))


def _nearly_in(logits_V: Tensor, token: int, keep: int | None, tie: float) -> bool:
    """Whether noise alone may have let a token past the borders of top-k and top-p: logits move by `tie` at most."""
    scaled_V = logits_V.double() / TEMPERATURE
    moved = tie * float(scaled_V.abs().max())
    best = scaled_V.topk(min(TOP_K, keep or TOP_K, len(scaled_V))).values
    above = float(torch.softmax(best, 0)[best > scaled_V[token] + moved].sum())
    lowered = above * math.exp(-moved) / (above * math.exp(-moved) + 1 - above)
    return float(scaled_V[token]) >= float(best[-1]) - moved and lowered < TOP_P


def judge(drawn: Sequence[Drawn]) -> tuple[list[ExactTest], list[str]]:
    """Tests of each graph, and of all that speculate together, which finds what is too small for one; then failures."""
    speculative = [one for one in drawn if max(one.index, default=0) > 0]
    groups = [*drawn, *([_together(speculative)] if len(speculative) > 1 else [])]
    share = FALSE_ALARM / (4 * max(len(groups), 1))
    tests = [test for one in groups for test in _tests(one, share)]
    failures = [f"{one.graph}: {what}" for one in drawn for what in one.excluded[:1]]
    failures += [
        f"{one.graph}: {one.borders} tokens from beyond top-k or top-p"
        for one in drawn
        if one.borders > BORDER_SHARE * len(one.index) + 2
    ]
    failures += [
        f"{t.graph}: {t.test} test over {t.tokens} tokens, p={t.p_value:.1e}" for t in tests if not t.p_value >= share
    ]
    return tests, failures


def _together(drawn: Sequence[Drawn]) -> Drawn:
    whole = Drawn("all that speculate")
    for one in drawn:
        whole.index += one.index
        whole.places += one.places
        whole.liked += one.liked
        whole.chance += one.chance
    return whole


def _tests(drawn: Drawn, share: float) -> Iterator[ExactTest]:
    """Tests of a step's first tokens, and of those that follow an accepted draft."""
    index = torch.tensor(drawn.index)
    for name, chosen in (("first", index == 0), ("later", index > 0)):
        size = int(chosen.sum())
        if size < LEAST:
            continue
        places = torch.tensor(drawn.places, dtype=torch.float64)[chosen]
        yield ExactTest(drawn.graph, f"rank, {name}", size, chi_square_uniform(places))
        chance = torch.tensor(drawn.chance, dtype=torch.float64)[chosen]
        liked = int(torch.tensor(drawn.liked)[chosen].sum())
        p_value = poisson_binomial_p(liked, chance)
        yield ExactTest(drawn.graph, f"draft, {name}", size, p_value, detectable_shift(chance, share))


def chi_square_uniform(places: Tensor) -> float:
    """p-value of uniformity over equal bins."""
    expected = len(places) / BINS
    seen = torch.histc(places.clamp(0, 1), BINS, 0.0, 1.0)
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


def to_json(tests: Sequence[ExactTest]) -> dict[str, Any]:
    """Plain data for the report."""
    return {
        "false_alarm_rate": FALSE_ALARM,
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "tests": [vars(test) for test in tests],
    }
