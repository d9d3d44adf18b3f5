"""Buckets from traffic: a budget of graphs, divided between prefill and kv buckets for least padding. No torch.

A request costs the tokens of its prompt's prefill bucket, and in each step of its answer the positions of its kv
bucket. Rows of one batch are counted as if each ran alone; a batch takes the bucket of its longest row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipeline.errors import InputError
from pipeline.graphs.dtypes import DTYPES
from pipeline.graphs.signature import stored_weights
from pipeline.measure.buckets import KV_MULTIPLE, PREFILL_MULTIPLE, Histogram, best_buckets, divide, padded
from pipeline.measure.traffic import Room, Traffic
from pipeline.models.weights import HEAD, up_to
from pipeline.plan.plan import Plan
from pipeline.recipe.backend_settings import InductorSettings

OPERATIONS_PER_BYTE = 250
"""Operations that a chip computes in the time of reading one byte: 16-bit matrix products over memory bandwidth, 230
for Trainium 1 and 2, 200 to 300 for NVIDIA's H200 and H100 (data sheets)."""


@dataclass(frozen=True)
class BucketSet:
    """The buckets of one kind: `padding` is tokens run over tokens needed, None if none is needed."""

    buckets: tuple[int, ...]
    graphs: int
    padding: float | None


@dataclass(frozen=True)
class Proposal:
    """By kind, `prefill` and `kv`: the recipe's buckets and the proposed ones.

    `rejected`: requests whose prompt is longer than the recipe's prefill buckets. `position_cost`: cost of a kv
    position in a step, in prompt tokens.
    """

    now: dict[str, BucketSet]
    proposed: dict[str, BucketSet]
    requests: int
    rejected: int
    position_cost: float


def room_of(plan: Plan) -> Room:
    """Return the lengths that the recipe's cache can take."""
    limits = (config.longest for config in (plan.pair.target, plan.pair.draft))
    return Room(plan.recipe.shapes.kv[-1], min(limits))


def propose(plan: Plan, traffic: Traffic, budget: int) -> Proposal:
    """Return the buckets that pad the traffic least with at most `budget` graphs.

    The largest kv bucket stays, and the largest prefill bucket does not shrink: they limit the requests that an
    artifact accepts. Without lengths of answers all kv buckets stay.

    Raises:
        InputError: the budget is too small for one bucket of each kind.

    """
    shapes, cost = plan.recipe.shapes, position_cost(plan)
    prompts, steps = traffic.prompts, step_lengths(plan, traffic)
    graphs = graphs_per_bucket(plan)
    longest = max(shapes.prefill[-1], min(up_to(max(prompts), PREFILL_MULTIPLE), shapes.kv[-1] - 1))
    prefill = best_buckets(prompts, longest, budget // graphs[0], PREFILL_MULTIPLE)
    kv, kv_graphs = [list(shapes.kv)], graphs[1] * len(shapes.kv)
    if traffic.has_answers:
        kv, kv_graphs = best_buckets(steps, shapes.kv[-1], budget // graphs[1], KV_MULTIPLE), graphs[1]
    costs = [padded(prompts, each) for each in prefill], [cost * padded(steps, each) for each in kv]
    counts = divide(costs, (graphs[0], kv_graphs), budget)
    if counts is None:
        what = f"found {budget}; one bucket of each kind needs {graphs[0] + kv_graphs} graphs"
        raise InputError(what, where="--graphs", fix=f"use {graphs[0] + kv_graphs} or more")
    chosen = {"prefill": prefill[counts[0] - 1], "kv": kv[counts[1] - 1]}
    return Proposal(
        now=_sets(plan, traffic, {"prefill": shapes.prefill, "kv": shapes.kv}),
        proposed=_sets(plan, traffic, chosen),
        requests=prompts.total() // traffic.copies,
        rejected=sum(count for length, count in prompts.items() if length > shapes.prefill[-1]) // traffic.copies,
        position_cost=cost,
    )


def _sets(plan: Plan, traffic: Traffic, buckets: Mapping[str, Sequence[int]]) -> dict[str, BucketSet]:
    """Return buckets with their graphs and padding. Attention that reads existing keys only pads no step."""
    lengths = {"prefill": traffic.prompts, "kv": step_lengths(plan, traffic)}
    found = {}
    for (kind, of), graphs in zip(buckets.items(), graphs_per_bucket(plan), strict=True):
        unpadded = kind == "kv" and position_cost(plan) == 0
        padding = 1.0 if unpadded else _padding(lengths[kind], of)
        found[kind] = BucketSet(tuple(of), len(of) * graphs, padding)
    return found


def graphs_per_bucket(plan: Plan) -> tuple[int, int]:
    """Return the graphs of a prefill bucket and of a kv bucket."""
    prefill = sum(spec.phase == "prefill" for spec in plan.graphs)
    shapes = plan.recipe.shapes
    return prefill // len(shapes.prefill), (len(plan.graphs) - prefill) // len(shapes.kv)


def step_lengths(plan: Plan, traffic: Traffic) -> Counter[int]:
    """Return how many steps need each kv length, with a step for each token of an answer but the first.

    A step after n tokens needs n positions, and room for K drafts if the cache has it.
    """
    drafts, longest = plan.recipe.speculation.draft_tokens[-1], plan.recipe.shapes.kv[-1]
    starts: Counter[int] = Counter()
    for (prompt, answer), count in traffic.requests.items():
        starts[prompt + 1] += count if answer else 0
        starts[prompt + answer] -= count if answer else 0
    lengths: Counter[int] = Counter()
    for length, steps in zip(range(longest), accumulate(starts[n] for n in range(longest)), strict=True):
        lengths[min(length + drafts, longest)] += steps
    return +lengths


def position_cost(plan: Plan) -> float:
    """Return the time to read a position of the target's cache, over that to compute a prompt token.

    0 on a CPU, where attention reads only the keys of a request, whatever the bucket.
    """
    backend, models = plan.recipe.backend, plan.pair.models
    if isinstance(backend, InductorSettings) and backend.device == "cpu":
        return 0.0
    config = models.target
    heads = [config.at(layer).kv_heads * config.at(layer).head_dim for layer in range(config.layers)]
    size_bytes = 2 * sum(heads) * DTYPES[models.target_dtype].size_bytes
    matrices = (w for w in stored_weights(models, "target") if w.kind == "linear" and w.name != HEAD)
    return size_bytes * OPERATIONS_PER_BYTE / (2 * sum(math.prod(weight.shape) for weight in matrices))


def _padding(lengths: Histogram, buckets: Sequence[int]) -> float | None:
    needed = sum(min(length, buckets[-1]) * count for length, count in lengths.items())
    return padded(lengths, buckets) / needed if needed else None
