"""Gate 2, stochastic: do the shipped graphs sample from the target's distribution? Exact tests on every graph.

A graph generates at the end of its KV bucket; teacher forcing then gives, for every token drawn, the target's own
distribution p and the draft's q at its position. For a correct graph, with any p and q:
- the *rank* test: a token's randomised position in the cumulative p is uniform on [0, 1] (Rosenblatt 1952). Chi-square.
- the *draft* test: tokens with q > p come as often as p predicts. Their count is a sum
  of independent Bernoulli draws of known probabilities, so its distribution is computed exactly, not approximated. It
  detects faults of acceptance: if it is too easy, or the residual is not used, these tokens come too often.
- no token with p = 0 is sampled.
A step's first token and its later tokens are tested separately (`exact_tests.py`).

Shapes: T tokens drawn, V vocabulary of the target, D of the draft.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import Choice
from pipeline.graphs.spec import GraphSpec
from pipeline.progress import working
from pipeline.runtime.engine import Engine
from pipeline.sources.values import draft_token_ids
from pipeline.validate.gates.driving import Draws, Row, step
from pipeline.validate.gates.exact_tests import FALSE_ALARM, Drawn, exact_tests
from pipeline.validate.gates.inputs import MODELS, GateInputs
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.scoring import score
from pipeline.validate.report.schema import Distribution

TEMPERATURE, TOP_K, TOP_P = 1.3, 12, 0.95
DRAWS = 160
"""Minimum number of tokens that a graph samples."""

BORDER_SHARE = 0.05
"""Share of tokens that noise may move across the limits of top-k and top-p; two more are allowed."""


def distribution(drawn: Sequence[Drawn]) -> GateOutcome[Distribution]:
    """Return the outcome of the tests of sampled tokens."""
    tests, least = exact_tests(drawn)
    findings = [f"{of.graph}: {what}" for of in drawn for what in of.excluded[:1]]
    findings += [
        f"{of.graph}: {of.borders} tokens outside top-k or top-p"
        for of in drawn
        if of.borders > BORDER_SHARE * len(of.index) + 2
    ]
    for test in tests:
        p_value = math.nan if test.p_value is None else test.p_value
        if not p_value >= least:
            findings.append(f"{test.graph}: {test.test} test over {test.tokens} tokens, p={p_value:.1e}")
    section = Distribution(
        false_alarm_rate=FALSE_ALARM, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, tests=tuple(tests)
    )
    return GateOutcome("distribution", section, tuple(findings))


@dataclass(frozen=True)
class Judge:
    """Settings of the tests: a draft's reduced vocabulary, candidates kept, and the noise.

    `tie` is the relative gap of two logits within which noise can swap them.
    """

    draft_ids: Tensor | None
    candidates: int | None
    tie: float

    def probabilities(self, logits_V: Tensor) -> dict[int, float]:
        """Return the distribution of logits under the test's settings: probability by token id, the likeliest first.

        Independent of the graphs' own sampling code.
        """
        best = (logits_V.double() / TEMPERATURE).topk(self._kept(logits_V))
        probs = torch.softmax(best.values, 0)
        inside = min(int((probs.cumsum(0) < TOP_P).sum()) + 1, len(probs))
        shares = probs[:inside] / probs[:inside].sum()
        return dict(zip(best.indices[:inside].tolist(), shares.tolist(), strict=True))

    def draft_probabilities(self, logits_D: Tensor) -> dict[int, float]:
        """Return the distribution of a draft, by the target's token ids."""
        shares = self.probabilities(logits_D)
        if self.draft_ids is None:
            return shares
        return {int(self.draft_ids[token]): share for token, share in shares.items()}

    def nearly_in(self, logits_V: Tensor, token: int) -> bool:
        """Return whether noise, which moves logits by `tie` at most, can explain a token outside top-k and top-p."""
        scaled_V = logits_V.double() / TEMPERATURE
        moved = self.tie * float(scaled_V.abs().max())
        best = scaled_V.topk(self._kept(logits_V)).values
        above = float(torch.softmax(best, 0)[best > scaled_V[token] + moved].sum())
        lowered = above * math.exp(-moved) / (above * math.exp(-moved) + 1 - above)
        return float(scaled_V[token]) >= float(best[-1]) - moved and lowered < TOP_P

    def _kept(self, logits_V: Tensor) -> int:
        return min(TOP_K, self.candidates or TOP_K, len(logits_V))


def draw_bucket(inputs: GateInputs, kv: int, probes: Sequence[list[int]], tie: float) -> Iterator[Drawn]:
    """Run every stochastic graph of a bucket, whose caches hold the probes, up to the end of the bucket."""
    judge = Judge(draft_token_ids(inputs.checkpoints[1]), inputs.engine.manifest.pair.candidates, tie)
    for spec in inputs.engine.graphs:
        if (spec.kv, spec.sampling) == (kv, "stochastic") and spec.phase in ("decode", "speculate"):
            with working(spec.name, inputs.progress):
                drawn = _draw(inputs.engine, spec, probes, judge)
            yield drawn


def _draw(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], judge: Judge) -> Drawn:
    """Generate with a graph, and score the sampled tokens. Short buckets run more than once."""
    usable = min(spec.kv, engine.length)
    size = min(-(-DRAWS // spec.batch), usable - 2)
    starts = [Row(list(probe[: usable - size + 1 - row % 2])) for row, probe in enumerate(probes[: spec.batch])]
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.draft_tokens)
    draws = Draws(Choice(TEMPERATURE, TOP_K, TOP_P), generator)
    scorers = [
        next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", model, spec.kv)) for model in MODELS
    ]
    for _ in range(-(-DRAWS // (spec.batch * size)) if size > 0 else 0):
        rows, indices = _generate(engine, spec, starts, usable, draws)
        begins = [row.start - 1 for row in rows]
        scored = [row.tokens[begin:-1] for row, begin in zip(rows, begins, strict=True)]
        target, draft = (score(engine, scorer, scored, begins) for scorer in scorers)
        for row, index, *logits in zip(rows, indices, target, draft, strict=True):
            _add_row(drawn, list(zip(row.new, index, *logits, strict=True)), judge, generator)
    return drawn


def _generate(
    engine: Engine, spec: GraphSpec, starts: Sequence[Row], usable: int, draws: Draws
) -> tuple[list[Row], list[list[int]]]:
    """Return rows driven to the end, and for each new token its index in the step that gave it."""
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    indices: list[list[int]] = [[] for _ in rows]
    step(engine, plain, [Row(row.tokens[:-1]) for row in rows], [True] * len(rows))
    while any(active := [len(row.tokens) - 1 < usable for row in rows]):
        for row, index, new in zip(rows, indices, step(engine, spec, rows, active, draws), strict=True):
            row.tokens.extend(new)
            index.extend(range(len(new)))
    return rows, indices


def _add_row(
    drawn: Drawn, tokens: Sequence[tuple[int, int, Tensor, Tensor]], judge: Judge, generator: torch.Generator
) -> None:
    """Add the tokens of a row, each with its index in its step and the logits of target and draft before it."""
    for token, index, target_V, draft_D in tokens:
        p = judge.probabilities(target_V)
        if token not in p:
            drawn.borders += 1
            if not judge.nearly_in(target_V, token):
                drawn.excluded.append(f"sampled token {token}, which has probability 0 in the target's distribution")
            continue
        q = judge.draft_probabilities(draft_D[: len(target_V)])  # a draft never proposes padding ids of its vocabulary
        before = list(p.values())[: list(p).index(token)]
        drawn.index.append(index)
        drawn.ranks.append(sum(before) + p[token] * float(torch.rand((), generator=generator)))
        drawn.liked.append(q.get(token, 0.0) > p[token])
        drawn.chance.append(sum(share for other, share in p.items() if q.get(other, 0.0) > share))
