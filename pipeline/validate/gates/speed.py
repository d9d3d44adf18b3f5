"""Gate 4: speed, one request at a time, plain decode and speculation in turn over the same prompts, in one run.

Has no limit. Definitions: `pipeline/runtime/latency.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.models.weights import weight_specs
from pipeline.runtime.latency import Latency, TimedRequest, engine_answer, latency_of
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.gates.answers import Answers
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.report.schema import Acceptance, Cost, Latencies, Speed

SPEED_PROMPTS, SPEED_TOKENS = 5, 24


def measure_speed(inputs: GateInputs, answers: Answers, first_k: Acceptance) -> Speed:
    """Measure plain decode, and speculation with the first K."""
    every = max(len(inputs.prompts) // SPEED_PROMPTS, 1)
    chosen = range(0, len(inputs.prompts), every)[:SPEED_PROMPTS]
    plain, speculative = _measured(inputs, [answers.encoded[i] for i in chosen], first_k.draft_tokens)
    target, draft = inputs.checkpoints
    draft_cost = _weights_read(draft) / _weights_read(target)
    price = inputs.recipe.validate_.price_per_hour
    return Speed(
        draft_tokens=first_k.draft_tokens,
        prompts=tuple(inputs.prompts[i].id for i in chosen),
        plain=_section(plain),
        speculative=_section(speculative),
        measured_speedup=speculative.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else None,
        expected_speedup=expected_speedup(first_k.accepted_given_previous, draft_cost),
        draft_cost=draft_cost,
        cost_per_million_tokens=Cost(plain=_cost(plain, price), speculative=_cost(speculative, price)),
    )


def _measured(inputs: GateInputs, prompts: Sequence[list[int]], draft_tokens: int) -> tuple[Latency, Latency]:
    """Time plain decode and speculation, in turn."""
    limit = min(SPEED_TOKENS, inputs.recipe.validate_.max_new_tokens)
    plainly = engine_answer(inputs.engine, limit, speculate=False)
    speculatively = engine_answer(inputs.engine, limit, draft_tokens=draft_tokens)
    plain: list[TimedRequest] = []
    speculative: list[TimedRequest] = []
    for prompt in (prompts[0], *prompts):
        plain.append(plainly(prompt))
        speculative.append(speculatively(prompt))
    return latency_of(plain[1:]), latency_of(speculative[1:])  # the first of all only warms up


def _section(latency: Latency) -> Latencies:
    return Latencies(
        first_token_ms=latency.first_token_ms,
        step_ms=tuple(round(value, 3) for value in latency.step_ms),
        step_p50_ms=latency.step_p50_ms,
        step_p99_ms=latency.step_p99_ms,
        inter_token_ms=latency.inter_token_ms,
        tokens_per_s=latency.tokens_per_s,
    )


def _cost(latency: Latency, price_per_hour: float | None) -> float | None:
    """Return the cost of a million tokens."""
    if price_per_hour is None or not latency.tokens_per_s:
        return None
    return price_per_hour / 3600 / latency.tokens_per_s * 1e6


def expected_speedup(rates: Sequence[float], draft_cost: float) -> float:
    """Return the expected tokens of a step over its cost in target passes (Leviathan et al. 2023, theorem 3.8).

    `rates` are acceptance rates given that the position is reached; their product replaces the power of one mean rate.
    """
    tokens, reach = 1.0, 1.0
    for rate in rates:
        reach *= rate
        tokens += reach
    return tokens / (len(rates) * draft_cost + 1)


def _weights_read(checkpoint: Checkpoint) -> int:
    """Return the number of weights that one pass of a model reads: layers and head, a row of the embedding at most."""
    config = checkpoint.config
    sizes = {spec.name: torch.Size(spec.shape).numel() for spec in weight_specs(config)}
    embedding = sizes["model.embed_tokens.weight"]
    return sum(sizes.values()) - (0 if config.tied else embedding)
