"""Measure latency: arrival times of a request's tokens, and the numbers that follow. The only definition in Tandem.

- First-token time: from the request to its first token, which prefill gives. Of several requests, the median.
- Step time: from one arrival of tokens to the next.
- Inter-token latency of a token: its step's time over the tokens of that step. A mean is over tokens.
- Tokens/s: tokens after each request's first one over the time they took, so the prompt's length does not count.
- Tokens per step: tokens after the first one over the steps that emitted them.
- p50 and p99: nearest rank, which is always a measured value.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import median

from pipeline.runtime.calls import Generation
from pipeline.runtime.engine import Engine


@dataclass(frozen=True)
class Arrival:
    """Tokens that arrived together, and their time after the request."""

    time_s: float
    tokens: int


@dataclass(frozen=True)
class DecodeTotals:
    """Tokens after the first one of each request, their time, and the steps that emitted them."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    def __add__(self, other: DecodeTotals) -> DecodeTotals:
        return DecodeTotals(self.tokens + other.tokens, self.seconds + other.seconds, self.steps + other.steps)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second; 0 where no token followed a first one."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens per step; 0 without steps."""
        return self.tokens / max(self.steps, 1)


@dataclass(frozen=True)
class TimedRequest:
    """Arrivals of one request, the prefill's token first."""

    arrivals: tuple[Arrival, ...]

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0].time_s

    @property
    def totals(self) -> DecodeTotals:
        """Tokens, seconds and steps after the first token."""
        tokens = sum(arrival.tokens for arrival in self.arrivals) - 1
        return DecodeTotals(tokens, self.arrivals[-1].time_s - self.first_token_s, len(self.arrivals) - 1)

    def steps(self) -> list[Arrival]:
        """Return each step's own time and its tokens."""
        return [Arrival(now.time_s - before.time_s, now.tokens) for before, now in pairwise(self.arrivals)]


Answer = Callable[[list[int]], TimedRequest]
"""Answers a prompt of token ids, and times it."""


@dataclass
class ArrivalClock:
    """Records arrival times of tokens; starts when it is created."""

    started: float = field(default_factory=time.perf_counter)
    arrivals: list[Arrival] = field(default_factory=list)

    def record(self, tokens: int) -> None:
        """Record that tokens arrived now."""
        self.arrivals.append(Arrival(time.perf_counter() - self.started, tokens))

    def on_tokens(self, index: int, tokens: list[int]) -> None:  # noqa: ARG002 - the engine's callback
        """Record an arrival: `on_tokens` of `Engine.generate` with one prompt."""
        self.record(len(tokens))

    def request(self) -> TimedRequest:
        """Return the arrivals so far."""
        return TimedRequest(tuple(self.arrivals))


@dataclass(frozen=True)
class Latency:
    """Numbers of several requests. None: no token followed a first one."""

    first_token_ms: float
    step_ms: tuple[float, ...]
    """Step times, ascending."""
    step_p50_ms: float | None
    step_p99_ms: float | None
    token_p50_ms: float | None
    token_p99_ms: float | None
    inter_token_ms: float | None
    """Mean."""
    tokens_per_s: float
    tokens_per_step: float


def generate_timed(
    engine: Engine, prompt: list[int], max_new_tokens: int, *, speculate: bool, draft_tokens: int | None = None
) -> tuple[TimedRequest, Generation]:
    """Answer one prompt greedily and time it."""
    clock = ArrivalClock()
    (answer,) = engine.generate(
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        speculate=speculate,
        draft_tokens=draft_tokens,
        on_tokens=clock.on_tokens,
    )
    return clock.request(), answer


def engine_answer(
    engine: Engine, max_new_tokens: int, *, speculate: bool = True, draft_tokens: int | None = None
) -> Answer:
    """Return a function that answers prompts through an engine."""

    def answer(tokens: list[int]) -> TimedRequest:
        return generate_timed(engine, tokens, max_new_tokens, speculate=speculate, draft_tokens=draft_tokens)[0]

    return answer


def latency_of(requests: Sequence[TimedRequest]) -> Latency:
    """Return the numbers of one or more requests."""
    steps = [step for request in requests for step in request.steps()]
    step_ms = sorted(step.time_s * 1e3 for step in steps)
    token_ms = sorted(value for step in steps for value in [step.time_s * 1e3 / step.tokens] * step.tokens)
    totals = sum((request.totals for request in requests), DecodeTotals())
    return Latency(
        first_token_ms=median(request.first_token_s for request in requests) * 1e3,
        step_ms=tuple(step_ms),
        step_p50_ms=quantile(step_ms, 0.5),
        step_p99_ms=quantile(step_ms, 0.99),
        token_p50_ms=quantile(token_ms, 0.5),
        token_p99_ms=quantile(token_ms, 0.99),
        inter_token_ms=totals.seconds * 1e3 / totals.tokens if totals.tokens else None,
        tokens_per_s=totals.tokens_per_s,
        tokens_per_step=totals.tokens_per_step,
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the value at the nearest rank of an ascending sequence; None of an empty one."""
    return ordered[max(ceil(len(ordered) * share) - 1, 0)] if ordered else None
