"""Gate 2, stochastic: do the shipped graphs sample from the target's distribution? Compared token by token.

A graph generates at the end of its KV bucket, each row with other settings (`judge.SETTINGS`); prefill graphs sample
after the probes. Teacher forcing then gives the target's logits before every token. For a correct graph:
- seed, position and logits select the token; the gate computes the selection by its own code.
- no token outside top-k and top-p is sampled.
- the *rank* test: a token's randomised position in the cumulative distribution is uniform on [0, 1] (Rosenblatt 1952),
  for a step's first token and for its later ones. Chi-square; it tests the random numbers (`exact_tests.py`).
- what a row samples does not change with the other rows (`independence.py`).

Shapes: T tokens drawn, V vocabulary of the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.graphs.arguments import PromptRow, prefill_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.progress import working
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.driving import Row, random_draws, rewind, step
from pipeline.validate.gates.exact_tests import FALSE_ALARM, Drawn, exact_tests
from pipeline.validate.gates.independence import dependent_rows
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.judge import SETTINGS, Judge, setting_of, words
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.sampled import Sample, add_sample
from pipeline.validate.gates.scoring import run_score, score
from pipeline.validate.report.schema import Distribution

DRAWS = 64
"""Minimum number of tokens that a step graph samples: nine or more at each of the settings, each compared exactly."""
PREFILL_DRAWS = 2 * len(SETTINGS)
"""Minimum number of tokens that a prefill graph samples."""

BORDER_SHARE = 0.05
"""Share of tokens that noise may move across the limits of top-k and top-p; two more are allowed."""


def distribution(drawn: Sequence[Drawn], candidates: int | None) -> GateOutcome[Distribution]:
    """Return the outcome of the tests of sampled tokens; `candidates` are those that graphs keep (None: all)."""
    tests, least = exact_tests(drawn)
    findings = [f"{of.graph}: {what}" for of in drawn for what in of.faults[:1]]
    findings += [
        f"{of.graph}: {of.borders} tokens outside top-k or top-p"
        for of in drawn
        if of.borders > BORDER_SHARE * of.tokens + 2
    ]
    for test in tests:
        p_value = math.nan if test.p_value is None else test.p_value
        if not p_value >= least:
            findings.append(f"{test.graph}: {test.test} test over {test.tokens} tokens, p={p_value:.1e}")
    left_out = [mass for of in drawn for mass in of.left_out]
    section = Distribution(
        false_alarm_rate=FALSE_ALARM,
        settings=tuple(words(choice) for choice in SETTINGS),
        tokens=sum(of.tokens for of in drawn),
        candidates=candidates,
        mass_left_out=(sum(left_out) / len(left_out), max(left_out)) if left_out else None,
        tests=tuple(tests),
    )
    return GateOutcome("distribution", section, tuple(findings))


def draw_bucket(
    inputs: GateInputs, kv: int, probes: Sequence[list[int]], tie: float, only: str | None = None
) -> Iterator[Drawn]:
    """Run every stochastic step graph of a bucket, or the one named `only`, up to the end of the bucket.

    The caches hold the probes.
    """
    judge = Judge(inputs.engine.manifest.pair.candidates, tie)
    for spec in inputs.engine.graphs:
        if spec.name in drawing(inputs.engine, kv) and only in (None, spec.name):
            with working(spec.name, inputs.progress):
                drawn = _draw(inputs.engine, spec, probes, judge)
            yield drawn


def drawing(engine: Engine, kv: int) -> list[str]:
    """Return the names of a bucket's stochastic graphs."""
    graphs = [graph for graph in engine.graphs if graph.phase in ("decode", "speculate")]
    return [graph.name for graph in graphs if (graph.kv, graph.sampling) == (kv, "stochastic")]


def draw_prefill(inputs: GateInputs, probes: Sequence[list[int]], tie: float) -> Iterator[Drawn]:
    """Run every stochastic prefill graph over ragged probes, whose first tokens have other settings at each run.

    Graphs of one token bucket read the same prompts, whose logits are computed once.
    """
    engine, judge = inputs.engine, Judge(inputs.engine.manifest.pair.candidates, tie)
    graphs = [spec for spec in engine.graphs if (spec.phase, spec.sampling) == ("prefill", "stochastic")]
    for tokens in dict.fromkeys(spec.tokens for spec in graphs):
        of_bucket, longest = [spec for spec in graphs if spec.tokens == tokens], min(tokens, engine.length - 1)
        most = max(spec.batch for spec in of_bucket)
        prompts = [list(probe[: max(longest - row, 1)]) for row, probe in enumerate(probes[:most])]
        logits = _last_logits(engine, prompts)
        for spec in of_bucket:
            with working(spec.name, inputs.progress):
                drawn = _draw_first(engine, spec, prompts[: spec.batch], logits, judge)
            yield drawn


def _draw(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], judge: Judge) -> Drawn:
    """Generate with a graph, and score the sampled tokens. Short buckets run more than once."""
    usable = min(spec.kv, engine.length)
    size = min(-(-DRAWS // spec.batch), usable - 2)
    starts = [Row(list(probe[: usable - size + 1 - row % 2])) for row, probe in enumerate(probes[: spec.batch])]
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.draft_tokens)
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    scorer = next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", "target", spec.kv))
    if size > 0:
        drawn.faults += dependent_rows(engine, spec, plain, starts)
    for _ in range(-(-DRAWS // (spec.batch * size)) if size > 0 else 0):
        rows, samples = _generate(engine, spec, plain, starts, generator)
        begins = [row.start - 1 for row in rows]
        scored = [row.tokens[:-1] for row in rows]
        for of_row, logits_TV in zip(samples, score(engine, scorer, scored, begins), strict=True):
            for sample, logits_V in zip(of_row, logits_TV, strict=True):
                add_sample(drawn, sample, judge, logits_V, generator)
    return drawn


def _generate(
    engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row], generator: torch.Generator
) -> tuple[list[Row], list[list[Sample]]]:
    """Return rows driven to the end of the bucket, and what each row sampled."""
    usable, run = min(spec.kv, engine.length), 0
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    samples: list[list[Sample]] = [[] for _ in rows]
    rewind(engine, plain, rows)
    while any(active := [len(row.tokens) - 1 < usable for row in rows]):
        settings = [setting_of(row, run) for row in range(len(rows))]
        draws = random_draws([SETTINGS[setting] for setting in settings], generator)
        news = step(engine, spec, rows, active, draws)
        for row, of_row, setting, draw, new in zip(rows, samples, settings, draws, news, strict=True):
            end = len(row.tokens)
            of_row.extend(Sample(token, i, setting, draw.seed, end + i) for i, token in enumerate(new))
            row.tokens.extend(new)
        run += 1
    return rows, samples


def _draw_first(
    engine: Engine, spec: GraphSpec, prompts: Sequence[list[int]], logits: Mapping[int, Tensor], judge: Judge
) -> Drawn:
    """Sample the token after the same prompts again and again, with other seeds and settings."""
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.tokens)
    for run in range(-(-PREFILL_DRAWS // len(prompts))):
        settings = [setting_of(row, run) for row in range(len(prompts))]
        draws = random_draws([SETTINGS[setting] for setting in settings], generator)
        rows = [PromptRow(prompt, row, draw) for row, (prompt, draw) in enumerate(zip(prompts, draws, strict=True))]
        tokens = engine.ranks.run(spec, prefill_arguments(spec, rows, engine.rows))["token"]
        for row, (prompt, draw, setting) in enumerate(zip(prompts, draws, settings, strict=True)):
            sample = Sample(int(tokens[row]), 0, setting, draw.seed, len(prompt))
            add_sample(drawn, sample, judge, logits[row], generator)
    return drawn


def _last_logits(engine: Engine, prompts: Sequence[list[int]]) -> Mapping[int, Tensor]:
    """Return the target's logits after each prompt, [V] by row."""
    longest = max(map(len, prompts))
    scorers = [g for g in engine.graphs if (g.phase, g.model) == ("score", "target")]
    spec = min((g for g in scorers if min(g.kv, engine.length) >= longest), key=lambda g: g.kv)
    last: dict[int, Tensor] = {}

    def keep(row: int, first: int, logits_TV: Tensor) -> None:
        if first + len(logits_TV) == len(prompts[start + row]):
            last[start + row] = logits_TV[-1].clone()

    for start in range(0, len(prompts), spec.batch):
        run_score(engine, spec, prompts[start : start + spec.batch], keep)
    return last
