"""Gate 2, shaped: do verify graphs sample from the scores that their rows ask for? Compared token by token.

Each row of a batch has other rules, other settings and other drafts: none, wrong ones, and the right ones to the end of
the step. Teacher forcing then gives the target's logits before every token; the gate applies the rules by its own code,
and `judge.py` decides whether a row's seed selects the token. What rules forbid has the score -inf: such a token is a
finding. Reported log probabilities are compared with those of the same logits. `proposals.py` tests propose graphs.

Shapes: T positions of a step, V vocabulary of the target, W words of a bit for each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import Draw
from pipeline.graphs.spec import GraphSpec
from pipeline.graphs.verify_arguments import RowRules, VerifyRow, verify_arguments, words
from pipeline.progress import working
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.driving import Row, random_draws, rewind
from pipeline.validate.gates.exact_tests import Drawn
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.judge import SETTINGS, Judge, setting_of
from pipeline.validate.gates.proposals import check_proposals
from pipeline.validate.gates.sampled import Sample, add_sample
from pipeline.validate.gates.scoring import score

KINDS = ("nothing", "penalties", "bias", "allowed", "min_p", "everything")
"""Rules of the test; rows of one batch have different ones."""
STEPS = len(KINDS)
"""Least number of steps that a row takes: each with rules of another kind."""
SAMPLED = 48
"""Least number of tokens that a graph chooses."""
LOGPROB_ERROR = 1e-3
"""Largest error of a log probability beside that of logits: float32 sums over a whole vocabulary."""


@dataclass(frozen=True)
class Ruled:
    """A chosen token with its rules, after the tokens `before` of its step; `allowed_V` bool, None: all."""

    sample: Sample
    rules: RowRules
    before: list[int]
    allowed_V: Tensor | None
    logprob: float
    top: tuple[list[int], list[float]]


def ruled_graphs(engine: Engine) -> list[GraphSpec]:
    """Return the graphs of requests with rules, which this gate tests."""
    return [graph for graph in engine.graphs if graph.phase in ("verify", "propose")]


def draw_by_rules(
    inputs: GateInputs, probes: Sequence[list[int]], tie: float, only: str | None = None
) -> Iterator[Drawn]:
    """Run every verify and propose graph, or the one named `only`, to the end of the caches, which hold the probes."""
    judge = Judge(inputs.engine.manifest.pair.candidates, tie)
    for spec in ruled_graphs(inputs.engine):
        if only in (None, spec.name):
            with working(spec.name, inputs.progress):
                if spec.phase == "verify":
                    drawn = _draw(inputs.engine, spec, probes, judge)
                else:
                    drawn = check_proposals(inputs, spec, probes, tie)
            yield drawn


def _draw(engine: Engine, spec: GraphSpec, probes: Sequence[list[int]], judge: Judge) -> Drawn:
    usable, width = min(spec.kv, engine.length), spec.draft_tokens + 1
    steps = max(STEPS, -(-SAMPLED // (spec.batch * width)))
    size = min(steps * width, usable - 2)
    rows = [Row(list(probe[: usable - size])) for probe in probes[: spec.batch]]
    rows = [Row(row.tokens, len(row.tokens)) for row in rows]
    generator = torch.Generator().manual_seed(spec.batch * 1000 + spec.draft_tokens)
    plain = next(g for g in engine.graphs if g.phase == "decode" and (g.batch, g.kv) == (spec.batch, spec.kv))
    rewind(engine, plain, rows)
    drawn = Drawn(spec.name)
    chosen: list[list[Ruled]] = [[] for _ in rows]
    for run in range(size // width):
        for of_row, of_step in zip(chosen, _step(engine, spec, rows, run, generator, drawn), strict=True):
            of_row += of_step
    scorer = next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", "target", spec.kv))
    begins = [row.start - 1 for row in rows]
    scored = [row.tokens[:-1] for row in rows]
    for of_row, logits_TV in zip(chosen, score(engine, scorer, scored, begins), strict=True):
        for ruled, logits_V in zip(of_row, logits_TV, strict=True):
            _judge(drawn, ruled, logits_V, judge, generator)
    return drawn


def _step(
    engine: Engine, spec: GraphSpec, rows: Sequence[Row], run: int, generator: torch.Generator, drawn: Drawn
) -> list[list[Ruled]]:
    """Take one step of every row to the end of its drafts: the graph runs again with the tokens that it chose so far.

    Tokens must not change with the drafts after them, so each run begins with the tokens of the run before.
    """
    vocab, width = engine.manifest.vocab, spec.draft_tokens + 1
    settings = [setting_of(row, run) for row in range(len(rows))]
    draws = random_draws([SETTINGS[setting] for setting in settings], generator)
    rules = [_rules(KINDS[(row + run) % len(KINDS)], width, vocab, generator) for row in range(len(rows))]
    drafts: list[list[int]] = [[] if row % 2 else [0] * spec.draft_tokens for row in range(len(rows))]
    for _ in range(width):
        given = {
            slot: VerifyRow(row.tokens[-1], len(row.tokens) - 1, drafts[slot], draws[slot], rules[slot])
            for slot, row in enumerate(rows)
        }
        out = engine.ranks.run(spec, verify_arguments(spec, given, vocab))
        emitted = [out["tokens"][slot, : int(out["count"][slot])].tolist() for slot in range(len(rows))]
        for slot, (new, before) in enumerate(zip(emitted, drafts, strict=True)):
            known = min(len(new), len(before))
            if new[: known - 1] != before[: known - 1]:
                drawn.faults.append(f"row {slot} emits other tokens when they are its drafts")
            drafts[slot] = new[: spec.draft_tokens]
        if all(len(new) == width for new in emitted):
            break
    found = [
        _ruled(out, slot, (settings[slot], draws[slot].seed), rows[slot], rules[slot]) for slot in range(len(rows))
    ]
    for row, new in zip(rows, emitted, strict=True):
        row.tokens.extend(new)
    return found


def _ruled(
    out: dict[str, Tensor], slot: int, draw: tuple[int, int], row: Row, rules: RowRules
) -> list[Ruled]:  # fmt: skip
    """Return what a step chose for a row."""
    (setting, seed), vocab_bits = draw, rules.allowed_TW
    found = []
    for place in range(int(out["count"][slot])):
        token, position = int(out["tokens"][slot, place]), len(row.tokens) + place
        allowed_V = None if vocab_bits is None else _bits(vocab_bits[place])
        top = out["top_ids"][slot, place].tolist(), out["top_logprobs"][slot, place].tolist()
        sample = Sample(token, place, setting, seed, position)
        before = out["tokens"][slot, :place].tolist()
        found.append(Ruled(sample, rules, before, allowed_V, float(out["logprobs"][slot, place]), top))
    return found


def _rules(kind: str, width: int, vocab: int, generator: torch.Generator) -> RowRules:
    """Return random rules of a kind, which change most choices: counts and prompts are not the row's own."""
    every, has = kind == "everything", {kind}
    bias_V = torch.zeros(vocab)
    if every or "bias" in has:
        ids = torch.randint(vocab, (max(vocab // 3, 1),), generator=generator)
        bias_V[ids] = torch.randn(len(ids), generator=generator) * 4
    counts_V = torch.randint(-4, 4, (vocab,), generator=generator).clamp(min=0).int()
    prompted_V = torch.rand(vocab, generator=generator) < 1 / 3
    allowed_TW = None
    if every or "allowed" in has:
        allowed_TW = torch.randint(-(2**31), 2**31, (width, words(vocab)), generator=generator).int()
    penalties = (-1.5, 0.7, 1.2) if every or "penalties" in has else (0.0, 0.0, 1.0)
    min_p = 0.3 if every or "min_p" in has else 0.0
    return RowRules(bias_V, counts_V, prompted_V, allowed_TW, min_p, *penalties)


def _judge(
    drawn: Drawn, ruled: Ruled, logits_V: Tensor, judge: Judge, generator: torch.Generator
) -> None:  # fmt: skip
    """Add a token, judged by the scores that its row asks for, and check its log probability.

    Noise moves tokens across the limit of `min_p`: those near it may be chosen, and need not be.
    """
    token, temperature = ruled.sample.token, SETTINGS[ruled.sample.setting].temperature
    scores_V = by_rules(logits_V.double(), ruled)
    noise = 2 * judge.tie * float(scores_V[scores_V.isfinite()].abs().max())
    least, score = _least(scores_V, ruled.rules.min_p, temperature), float(scores_V[token])
    if score == -math.inf or score < least - noise:
        drawn.faults.append(f"chose token {token}, which its row's rules exclude")
        return
    scores_V[scores_V < least + noise] = -math.inf
    scores_V[token] = score
    if least == -math.inf:
        add_sample(drawn, ruled.sample, judge, scores_V.float(), generator)
    else:  # without the tokens near the limit the rank is not uniform: only what the seed selects is tested
        drawn.tokens += 1
        draw = Draw(SETTINGS[ruled.sample.setting], ruled.sample.seed)
        if not judge.selects(scores_V.float(), draw, ruled.sample.position, token):
            drawn.faults.append(f"chose token {token}, which its seed does not select")
    wanted_V = torch.log_softmax(logits_V.double(), 0)
    allowed = LOGPROB_ERROR + 4 * judge.tie * float(logits_V.abs().max())
    ids, values = ruled.top
    errors = [abs(float(wanted_V[token]) - ruled.logprob)]
    errors += [abs(float(wanted_V[other]) - value) for other, value in zip(ids, values, strict=True)]
    errors += (wanted_V.topk(len(ids)).values - torch.tensor(values, dtype=torch.float64)).abs().tolist()
    if not max(errors) <= allowed:
        drawn.faults.append(f"log probability is wrong by {max(errors):.2g}, accepted: {allowed:.2g}")


def by_rules(logits_V: Tensor, ruled: Ruled) -> Tensor:
    """Return the scores that rules but `min_p` give, float64 [V], a token at a time: not by code of graphs."""
    rules = ruled.rules
    assert rules.counts_V is not None
    assert rules.prompted_V is not None
    scores_V = logits_V.clone() if rules.bias_V is None else logits_V + rules.bias_V.double()
    counts_V = rules.counts_V.clone()
    for token in ruled.before:
        counts_V[token] += 1
    seen_V = (counts_V > 0) | rules.prompted_V
    factor_V = torch.where(scores_V > 0, 1 / rules.repetition_penalty, rules.repetition_penalty)
    scores_V[seen_V] *= factor_V[seen_V]
    scores_V -= torch.where(counts_V > 0, rules.presence_penalty + rules.frequency_penalty * counts_V, 0.0)
    if ruled.allowed_V is not None:
        scores_V[~ruled.allowed_V[: len(scores_V)]] = -math.inf
    return scores_V


def _least(scores_V: Tensor, min_p: float, temperature: float) -> float:
    """Return the lowest score that `min_p` keeps: its probability is `min_p` of the highest one's."""
    return float(scores_V.max()) + temperature * math.log(min_p) if min_p and temperature else -math.inf


def _bits(words_W: Tensor) -> Tensor:
    """Return the bits of words as bool, one after another."""
    return ((words_W[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten() == 1
