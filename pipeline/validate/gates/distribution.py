"""Gate 2, stochastic: do the shipped graphs sample from the target's distribution? Exact tests on every graph.

A graph generates at the end of its KV bucket, each row with other settings (`judge.SETTINGS`); teacher forcing then
gives, for every token drawn, the target's own distribution p and the draft's q at its position. For a correct graph,
with any p and q:
- the *rank* test: a token's randomised position in the cumulative p is uniform on [0, 1] (Rosenblatt 1952). Chi-square.
- the *draft* test: tokens with q > p come as often as p predicts. Their count is a sum
  of independent Bernoulli draws of known probabilities, so its distribution is computed exactly, not approximated. It
  detects faults of acceptance: if it is too easy, or the residual is not used, these tokens come too often.
- no token with p = 0 is sampled.
- a row's random numbers select the token of a prefill or decode graph, and the first token of a speculate graph.
  (The head of a later draft reads its own output, so teacher forcing does not give its distribution.)
- what a row samples does not change with the other rows (`independence.py`).
A step's first token and its later tokens are tested separately (`exact_tests.py`).

Shapes: T tokens drawn, V vocabulary of the target, D of the draft.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import Draw, PromptRow, prefill_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.progress import working
from pipeline.runtime.engine import Engine
from pipeline.sources.values import draft_token_ids
from pipeline.validate.gates.driving import Row, copies_of, random_draws, rewind, step
from pipeline.validate.gates.exact_tests import FALSE_ALARM, Drawn, exact_tests
from pipeline.validate.gates.independence import dependent_rows
from pipeline.validate.gates.inputs import MODELS, GateInputs
from pipeline.validate.gates.judge import SETTINGS, Judge, Numbers, setting_of, words
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.scoring import run_score, score
from pipeline.validate.report.schema import Distribution

DRAWS = 160
"""Minimum number of tokens that a step graph samples."""
PREFILL_DRAWS = 2 * len(SETTINGS)
"""Minimum number of tokens that a prefill graph samples."""

BORDER_SHARE = 0.05
"""Share of tokens that noise may move across the limits of top-k and top-p; two more are allowed."""


def distribution(drawn: Sequence[Drawn]) -> GateOutcome[Distribution]:
    """Return the outcome of the tests of sampled tokens."""
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
    section = Distribution(
        false_alarm_rate=FALSE_ALARM, settings=tuple(words(choice) for choice in SETTINGS), tests=tuple(tests)
    )
    return GateOutcome("distribution", section, tuple(findings))


@dataclass(frozen=True)
class Sample:
    """A sampled token, its index in its step, and its settings.

    `numbers`: the random numbers that decide it, if they are known: a single one of a prefill or decode graph.
    """

    token: int
    index: int
    setting: int
    numbers: float | Numbers | None


def draw_bucket(inputs: GateInputs, kv: int, probes: Sequence[list[int]], tie: float) -> Iterator[Drawn]:
    """Run every stochastic step graph of a bucket, whose caches hold the probes, up to the end of the bucket."""
    judge = _judge(inputs, tie)
    for spec in inputs.engine.graphs:
        if (spec.kv, spec.sampling) == (kv, "stochastic") and spec.phase in ("decode", "speculate"):
            with working(spec.name, inputs.progress):
                drawn = _draw(inputs.engine, spec, probes, judge)
            yield drawn


def draw_prefill(inputs: GateInputs, probes: Sequence[list[int]], tie: float) -> Iterator[Drawn]:
    """Run every stochastic prefill graph over ragged probes, whose first tokens have other settings at each run."""
    judge = _judge(inputs, tie)
    for spec in inputs.engine.graphs:
        if (spec.phase, spec.sampling) == ("prefill", "stochastic"):
            with working(spec.name, inputs.progress):
                drawn = _draw_first(inputs.engine, spec, probes, judge)
            yield drawn


def _judge(inputs: GateInputs, tie: float) -> Judge:
    return Judge(draft_token_ids(inputs.checkpoints[1]), inputs.engine.manifest.pair.candidates, tie)


def _draw(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], judge: Judge) -> Drawn:
    """Generate with a graph, and score the sampled tokens. Short buckets run more than once."""
    usable = min(spec.kv, engine.length)
    size = min(-(-DRAWS // spec.batch), usable - 2)
    starts = [Row(list(probe[: usable - size + 1 - row % 2])) for row, probe in enumerate(probes[: spec.batch])]
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.draft_tokens)
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    scorers = [
        next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", model, spec.kv)) for model in MODELS
    ]
    if size > 0:
        drawn.faults += dependent_rows(engine, spec, plain, starts)
    for _ in range(-(-DRAWS // (spec.batch * size)) if size > 0 else 0):
        rows, samples = _generate(engine, spec, plain, starts, generator)
        rewind(engine, plain, starts)
        begins = [row.start - 1 for row in rows]
        scored = [row.tokens[begin:-1] for row, begin in zip(rows, begins, strict=True)]
        target, draft = (score(engine, scorer, scored, begins) for scorer in scorers)
        for row_samples, target_TV, draft_TD in zip(samples, target, draft, strict=True):
            for sample, target_V, draft_D in zip(row_samples, target_TV, draft_TD, strict=True):
                _add(drawn, sample, judge, target_V, draft_D, generator)
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
        draws = random_draws(spec, [SETTINGS[setting] for setting in settings], generator)
        news = step(engine, spec, rows, active, draws)
        for row, of_row, setting, draw, new in zip(rows, samples, settings, draws, news, strict=True):
            copies = copies_of(row.tokens, spec.draft_tokens) if engine.manifest.lookup else []
            numbers = _numbers(spec, draw, copies, usable - len(row.tokens))
            of_row.extend(Sample(token, i, setting, None if i else numbers) for i, token in enumerate(new))
            row.tokens.extend(new)
        run += 1
    return rows, samples


def _numbers(spec: GraphSpec, draw: Draw, copies: Sequence[int], room: int) -> float | Numbers:
    """Return the random numbers of a row's first token in a step."""
    assert draw.uniforms is not None
    uniforms, steps = draw.uniforms.tolist(), spec.draft_tokens
    if spec.phase == "decode":
        return float(uniforms[0])
    return Numbers(uniforms[0], uniforms[steps], uniforms[2 * steps], next(iter(copies), None), room)


def _draw_first(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], judge: Judge) -> Drawn:
    """Sample the token after the same prompts again and again, with other random numbers and settings."""
    longest = min(spec.tokens, engine.length - 1)
    prompts = [list(probe[: max(longest - row, 1)]) for row, probe in enumerate(probes[: spec.batch])]
    logits = _last_logits(engine, prompts)
    drawn = Drawn(spec.name)
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.tokens)
    for run in range(-(-PREFILL_DRAWS // len(prompts))):
        settings = [setting_of(row, run) for row in range(len(prompts))]
        draws = random_draws(spec, [SETTINGS[setting] for setting in settings], generator)
        rows = [PromptRow(prompt, row, draw) for row, (prompt, draw) in enumerate(zip(prompts, draws, strict=True))]
        tokens = engine.ranks.run(spec, prefill_arguments(spec, rows, engine.rows))["token"]
        for row, (draw, setting) in enumerate(zip(draws, settings, strict=True)):
            assert draw.uniforms is not None
            sample = Sample(int(tokens[row]), 0, setting, float(draw.uniforms[0]))
            _add(drawn, sample, judge, logits[row], None, generator)
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


def _add(
    drawn: Drawn, sample: Sample, judge: Judge, target_V: Tensor, draft_D: Tensor | None, generator: torch.Generator
) -> None:
    """Add a sampled token, with the logits of target and draft before it."""
    choice, token = SETTINGS[sample.setting], sample.token
    drawn.tokens += 1
    p_V = judge.probabilities(target_V, choice)
    if p_V[token] == 0:
        drawn.borders += 1
        if not judge.nearly_in(target_V, choice, token):
            drawn.faults.append(f"sampled token {token}, which has probability 0 at {words(choice)}")
        return
    if not _explained(judge, sample, target_V, draft_D):
        drawn.faults.append(f"sampled token {token}, which its random numbers do not select, at {words(choice)}")
    if p_V[token] == 1:  # says nothing
        return
    q_V = torch.zeros_like(p_V) if draft_D is None else judge.draft_probabilities(draft_D, choice, len(p_V))
    tied = float(p_V[target_V == target_V[token]].sum())
    drawn.index.append(sample.index)
    drawn.settings.append(sample.setting)
    drawn.ranks.append(float(p_V[target_V > target_V[token]].sum()) + tied * float(torch.rand((), generator=generator)))
    drawn.liked.append(bool(q_V[token] > p_V[token]))
    drawn.chance.append(float(p_V[q_V > p_V].sum()))


def _explained(judge: Judge, sample: Sample, target_V: Tensor, draft_D: Tensor | None) -> bool:
    choice, numbers = SETTINGS[sample.setting], sample.numbers
    if isinstance(numbers, Numbers):
        assert draft_D is not None
        return judge.explains(target_V, draft_D, choice, numbers, sample.token)
    return numbers is None or judge.selects(target_V, choice, numbers, sample.token)
