"""Gates 3 and 4: how much speculation gains, by place, class and prompt, and how fast it is. Measures; proves nothing.

Speed is one request at a time, plain decode and speculation in turn over the same prompts, in one run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from pipeline.runtime.engine import Engine, Generation
from pipeline.validate.prompts import Prompt

SPEED_PROMPTS, SPEED_TOKENS = 5, 24


def acceptance(prompts: Sequence[Prompt], answers: Sequence[Generation], steps: int) -> dict[str, Any]:
    """Figures of one K: see `report.Acceptance`."""
    emitted = [n for answer in answers for n in answer.emitted_per_step]
    total = max(len(emitted), 1)
    reached = [sum(n > place + 1 for n in emitted) for place in range(steps)]
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    return {
        "draft_tokens": steps,
        "tokens_per_step": tokens_per_step(answers),
        "accepted_by_position": [count / total for count in reached],
        "accepted_given_previous": given_previous(emitted, steps),
        "lengths": [Counter(emitted)[n] for n in range(1, steps + 2)],
        "by_class": {kind: _of_class(prompts, answers, kind, steps) for kind in kinds},
        "by_prompt": {p.id: tokens_per_step([a]) for p, a in zip(prompts, answers, strict=True) if a.steps},
    }


def given_previous(emitted: Sequence[int], steps: int) -> list[float]:
    """Share of draft tokens accepted at each of `steps` places, given that all before were; from tokens of steps."""
    reached = [sum(n > place + 1 for n in emitted) for place in range(steps)]
    tried = [len(emitted), *reached[:-1]]
    return [count / max(of, 1) for count, of in zip(reached, tried, strict=True)]


def tokens_per_step(answers: Sequence[Generation]) -> float:
    """Mean tokens that a speculative step emits."""
    steps = sum(answer.steps for answer in answers)
    return sum(sum(answer.emitted_per_step) for answer in answers) / max(steps, 1)


def _of_class(prompts: Sequence[Prompt], answers: Sequence[Generation], kind: str, steps: int) -> dict[str, Any]:
    chosen = [answer for prompt, answer in zip(prompts, answers, strict=True) if prompt.kind == kind]
    emitted = [n for answer in chosen for n in answer.emitted_per_step]
    return {
        "tokens_per_step": tokens_per_step(chosen),
        "accepted_by_position": [sum(n > i + 1 for n in emitted) / max(len(emitted), 1) for i in range(steps)],
    }


def expected_speedup(rates: Sequence[float], draft_cost: float) -> float:
    """Expected tokens of a step over its cost in target passes (Leviathan et al. 2023, theorem 3.8).

    `rates` are acceptance rates given that the place is reached; their product replaces the power of one mean rate.
    """
    tokens, reach = 1.0, 1.0
    for rate in rates:
        reach *= rate
        tokens += reach
    return tokens / (len(rates) * draft_cost + 1)


def speed(
    engine: Engine, encoded: Sequence[list[int]], names: Sequence[str], steps: int, tokens: int
) -> dict[str, Any]:
    """Latencies in ms, plain and with speculation: see `report.Speed`."""
    runs: dict[str, list[tuple[list[float], int]]] = {"plain": [], "speculative": []}
    for number, prompt in enumerate([encoded[0], *encoded]):
        for name, draft_tokens in (("plain", None), ("speculative", steps)):
            arrivals, answer = timed(engine, prompt, tokens, draft_tokens)
            if number:  # the first of all only warms up
                runs[name].append((arrivals, len(answer.tokens)))
    found = {name: _latencies(of) for name, of in runs.items()}
    measured = (
        found["speculative"]["tokens_per_s"] / found["plain"]["tokens_per_s"]
        if found["plain"]["tokens_per_s"]
        else None
    )
    return {"draft_tokens": steps, "prompts": list(names), **found, "measured_speedup": measured}


def timed(engine: Engine, prompt: list[int], limit: int, draft_tokens: int | None) -> tuple[list[float], Generation]:
    """Arrival of each step's tokens in seconds, and the answer; plain decode without `draft_tokens`."""
    arrivals: list[float] = []
    started = time.perf_counter()
    answer = engine.generate(
        [prompt], max_new_tokens=limit, speculate=draft_tokens is not None, draft_tokens=draft_tokens,
        on_tokens=lambda index, new: arrivals.append(time.perf_counter() - started),  # noqa: ARG005
    )[0]  # fmt: skip
    return arrivals, answer


def _latencies(runs: Sequence[tuple[list[float], int]]) -> dict[str, Any]:
    first = [arrivals[0] * 1e3 for arrivals, _ in runs]
    steps = sorted((b - a) * 1e3 for arrivals, _ in runs for a, b in pairwise(arrivals))
    after = sum(arrivals[-1] - arrivals[0] for arrivals, _ in runs)
    tokens = sum(count - 1 for _, count in runs)
    return {
        "first_token_ms": median(first),
        "step_ms": [round(value, 3) for value in steps],
        "step_p50_ms": _quantile(steps, 0.5),
        "step_p99_ms": _quantile(steps, 0.99),
        "inter_token_ms": after * 1e3 / tokens if tokens else None,
        "tokens_per_s": tokens / after if after else 0.0,
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None
