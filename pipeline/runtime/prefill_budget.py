"""How many tokens of prompts a step reads beside running rows, so that no answer waits long for another's prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.graphs.arguments import PromptRow, StepRow, prefill_arguments, step_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.batch import Batch

MEASURED_TOKENS = 64
"""Bucket from which on a prefill call is long enough to tell the time of a token."""


@dataclass(frozen=True)
class PrefillBudget:
    """Measured seconds of an artifact's calls on this host, and its prefill buckets.

    `call` and `token` are seconds of a prefill call by itself and of each of its tokens, `steps` those of a step by the
    number of rows that its graph holds.
    """

    call: float
    token: float
    steps: Mapping[int, float]
    buckets: tuple[int, ...]

    def tokens(self, running: int, waiting: int) -> int:
        """Return how many tokens of prompts a step reads beside `running` rows.

        Each of the `waiting` prompts gets the time of a step of these rows: one prompt that arrives at most doubles the
        time between their tokens, however long it is, and many prompts do not wait for each other.
        """
        seconds = waiting * self.steps[min(batch for batch in self.steps if batch >= running)]
        tokens = int((seconds - self.call) / self.token)
        fits = [bucket for bucket in self.buckets if bucket <= tokens]
        # A chunk begins with a token that was read before, so a bucket of T tokens reads T - 1 new ones.
        return tokens if tokens > self.buckets[-1] else max(fits, default=self.buckets[0]) - 1


def measured_budget(batch: Batch) -> PrefillBudget:
    """Return the budget of an open artifact whose graphs are warm. Takes about the time of a prompt of 100 tokens."""
    first = batch.manifest.shapes.batch[0]
    prefill = sorted((g for g in batch.graphs if g.phase == "prefill" and g.batch == first), key=lambda g: g.tokens)
    small, large = prefill[0], next((g for g in prefill if g.tokens >= MEASURED_TOKENS), prefill[-1])
    seconds = {graph.tokens: _seconds(batch, graph) for graph in (small, large)}
    if small.tokens == large.tokens:
        call, token = 0.0, seconds[small.tokens] / small.tokens
    else:
        token = max((seconds[large.tokens] - seconds[small.tokens]) / (large.tokens - small.tokens), 1e-6)
        call = max(seconds[small.tokens] - token * small.tokens, 0.0)
    steps = {graph.batch: _seconds(batch, graph) for graph in _steps(batch)}
    return PrefillBudget(call, token, steps, batch.manifest.shapes.prefill)


def _steps(batch: Batch) -> list[GraphSpec]:
    """Return the graph of a usual step for each number of rows: greedy if that was built, with the first K."""
    manifest = batch.manifest
    usual = ("speculate", manifest.shapes.kv[-1], manifest.draft_tokens[0], manifest.sampling[0])
    return [
        graph for graph in batch.graphs
        if (graph.phase, graph.kv, graph.draft_tokens, graph.sampling) == usual
    ]  # fmt: skip


def _seconds(batch: Batch, graph: GraphSpec) -> float:
    """Return the time of a call whose rows are full, in the middle of the cache."""
    middle = batch.length // 2
    if graph.phase == "prefill":
        tokens = [0] * graph.tokens
        position = middle if graph.continues else 0
        rows = [PromptRow(tokens[: batch.length - position], slot, position=position) for slot in range(graph.batch)]
        arguments = prefill_arguments(graph, rows, batch.slots)
    else:
        arguments = step_arguments(graph, {slot: StepRow(0, middle) for slot in range(graph.batch)})
    start = time.perf_counter()
    batch.ranks.run(graph, arguments)
    return time.perf_counter() - start
