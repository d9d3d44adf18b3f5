"""Gate 2: does speculation change the output? On the shipped graphs.

Greedy: tokens equal plain decode's; in low precision a difference is allowed only at a near-tie, and counted.
Stochastic: draws of one `speculate` step against the target's own distribution, by a chi-square test at a fixed
false-alarm rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.plan import GraphSpec
from pipeline.runtime.engine import Engine, Generation
from pipeline.validate.parity import score

FALSE_ALARM = 1e-4
"""Probability that a correct artifact fails one chi-square test."""

DRAWS = 320
TEMPERATURE, TOP_K, TOP_P = 1.3, 12, 0.95


@dataclass(frozen=True)
class ChiSquare:
    """One test: position in the step, statistic, degrees of freedom, p-value, draws."""

    position: int
    statistic: float
    degrees: int
    p_value: float
    draws: int


def compare_greedy(plain: list[Generation], speculative: list[Generation]) -> list[dict[str, Any]]:
    """Prompts whose tokens differ, with the first place."""
    found = []
    for index, (a, b) in enumerate(zip(plain, speculative, strict=True)):
        if a.tokens != b.tokens:
            pairs = zip(a.tokens, b.tokens, strict=False)
            place = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))
            found.append({"prompt": index, "position": place})
    return found


def is_near_tie(engine: Engine, prefix: list[int], choices: tuple[int, int], dtype: str) -> bool:
    """Whether both tokens lie within the dtype's rounding of the best logit after `prefix`."""
    last_V = _last_logits(engine, prefix)
    unit = {"float32": 2**-20, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    noise = unit * float(last_V.abs().max())
    return all(float(last_V.max() - last_V[token]) <= noise for token in choices)


def chi_square_step(engine: Engine, spec: GraphSpec, prompt: list[int], seed: int) -> list[ChiSquare]:
    """Repeat one stochastic step from the same state and test its first and second token.

    The second token is tested among draws that share the most frequent first one and emitted at least two.
    """
    tokens, counts = _draw(engine, spec, prompt, seed)
    tests = [_test(tokens[:, 0], expected(engine, prompt), 0)]
    values, sizes = tokens[:, 0].unique(return_counts=True)
    modal = int(values[sizes.argmax()])
    second = tokens[(tokens[:, 0] == modal) & (counts >= 2), 1]
    if len(second) >= DRAWS // 8:
        tests.append(_test(second, expected(engine, [*prompt, modal]), 1))
    return tests


def expected(engine: Engine, prefix: list[int]) -> Tensor:
    """The target's distribution after `prefix` under the test's settings, float64 [V]; independent of the graphs."""
    logits_V = _last_logits(engine, prefix).double() / TEMPERATURE
    keep = engine.manifest.candidates or len(logits_V)
    order = logits_V.argsort(descending=True)[: min(TOP_K, keep)]
    probs = torch.softmax(logits_V[order], 0)
    inside = int((probs.cumsum(0) < TOP_P).sum()) + 1
    out = torch.zeros_like(logits_V)
    out[order[:inside]] = probs[:inside] / probs[:inside].sum()
    return out


def _last_logits(engine: Engine, prefix: list[int]) -> Tensor:
    specs = [g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv >= len(prefix)]
    return score(engine, min(specs, key=lambda g: g.kv), [prefix])[0][-1]


def _draw(engine: Engine, spec: GraphSpec, prompt: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [draws, K+1] and counts of repeated steps; every row of the batch holds the same prompt."""
    models = [
        next(g for g in engine.graphs if g.phase == "score" and g.model == m and g.kv >= len(prompt))
        for m in ("target", "draft")
    ]
    for model in models:
        score(engine, model, [prompt] * model.batch)
    generator = torch.Generator().manual_seed(seed)
    rows = spec.batch
    arguments = {
        "last_token": torch.full((rows,), prompt[-1], dtype=torch.int32),
        "position": torch.full((rows,), len(prompt) - 1, dtype=torch.int32),
        "active": torch.ones(rows, dtype=torch.bool),
        "temperature": torch.full((rows,), TEMPERATURE),
        "top_k": torch.full((rows,), TOP_K, dtype=torch.int32),
        "top_p": torch.full((rows,), TOP_P),
    }
    tokens, counts = [], []
    for _ in range(-(-DRAWS // rows)):
        uniforms = torch.rand(rows, 2 * spec.draft_tokens + 1, generator=generator)
        out = engine.ranks.run(spec, arguments | {"uniforms": uniforms})
        tokens.append(out["tokens"].clone())
        counts.append(out["count"].clone())
    return torch.cat(tokens), torch.cat(counts)


def _test(drawn: Tensor, probs_V: Tensor, position: int) -> ChiSquare:
    """Pearson's test; outcomes expected fewer than 5 times share a bin, impossible ones fail outright."""
    total = len(drawn)
    seen_V = torch.bincount(drawn.long(), minlength=len(probs_V)).double()
    if bool((seen_V[probs_V == 0] > 0).any()):
        return ChiSquare(position, float("inf"), 0, 0.0, total)
    expected_V = probs_V * total
    large = expected_V >= 5
    seen = torch.cat((seen_V[large], seen_V[~large].sum()[None]))
    wanted = torch.cat((expected_V[large], expected_V[~large].sum()[None]))
    used = wanted > 0
    statistic = float(((seen - wanted)[used] ** 2 / wanted[used]).sum())
    degrees = int(used.sum()) - 1
    if degrees < 1:
        return ChiSquare(position, statistic, 0, 1.0, total)
    p_value = float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))
    return ChiSquare(position, statistic, degrees, p_value, total)
