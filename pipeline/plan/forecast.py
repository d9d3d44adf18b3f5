"""What a build will take: time, memory and size, from builds recorded on this machine, else from constants. Pure.

A graph that was compiled before is expected to take what it took. Others take their estimate times the median ratio of
recorded and estimated times of their phase, so one build of any recipe corrects the estimates of all. Without a record,
the estimates are those of the processor's kind.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.errors import no_string
from pipeline.plan.estimates import (
    ESTIMATES,
    HEADERS_S,
    REFERENCE,
    USUAL,
    Pace,
    Work,
    gates_memory_bytes,
    stage_seconds,
)
from pipeline.plan.history import PastBuild
from pipeline.plan.plan import Plan

NEWEST = 5
"""Builds that count, of one graph or stage."""
LEAST_S = 2.0
"""Time from which a stage's ratio counts: shorter ones are mostly constant."""
ENOUGH, SIMILAR = 4, 50
"""Least and most graphs of one phase that count for the ratio of recorded and estimated times; of fewer, all graphs do.
The first graphs of a build take longer, because they precompile headers."""


@dataclass(frozen=True)
class GraphForecast:
    """What compiling one graph takes on a core. `recorded`: it was compiled on this machine before."""

    seconds: float
    memory_bytes: int
    size_bytes: int
    recorded: bool


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage of a build, expected and taken."""

    expected_s: float
    took_s: float


@dataclass(frozen=True)
class Forecast:
    """What a build from nothing takes: its graphs by name, and its other stages in seconds.

    `builds` is the number of recorded builds that it rests on; 0: constants only. `headers_s` is the time before the
    first graphs, for headers.
    """

    graphs: Mapping[str, GraphForecast]
    stages: Mapping[str, float]
    gates_memory_bytes: int
    builds: int
    headers_s: float = 0.0

    def compile_s(self, workers: int, names: Iterable[str] | None = None) -> float:
        """Return the time to compile the graphs `names` (None: all)."""
        if names is not None:
            no_string(names, "names", "names")
        seconds = [self.graphs[name].seconds for name in (self.graphs if names is None else names)]
        return makespan(seconds, workers) + (self.headers_s if seconds else 0.0)

    def total_s(self, workers: int) -> float:
        """Return the time of a whole build."""
        return self.compile_s(workers) + sum(self.stages.values())

    def memory_bytes(self, workers: int) -> int:
        """Return the host memory that a build needs at its peak."""
        largest = heapq.nlargest(workers, (graph.memory_bytes for graph in self.graphs.values()))
        return max(sum(largest), self.gates_memory_bytes)

    @property
    def graphs_bytes(self) -> int:
        """Size of all graphs."""
        return sum(graph.size_bytes for graph in self.graphs.values())

    @property
    def basis(self) -> str:
        """What the forecast rests on, in words."""
        if not self.builds:
            return "rough estimates, up to several times too low: no build was recorded on this machine"
        return f"estimates from {self.builds} recorded build{'s' if self.builds > 1 else ''}"


def forecast(plan: Plan, work: Work, builds: Sequence[PastBuild], pace: Pace = USUAL) -> Forecast:
    """Return what a build of `plan` takes, from the builds of this machine, the newest first.

    `pace` is that of its processor (`pace_of`); another compiler has none.
    """
    pace = pace if plan.cost_kind.startswith("inductor") else USUAL
    similar = [build for build in builds if build.cost == plan.cost_kind]
    same = [build for build in similar if build.plan == plan.digest(work)]
    estimated = stage_seconds(plan.pair, plan.memory, work)
    gates_memory = _recent([build.gates_memory_bytes for build in same if build.gates_memory_bytes])
    return Forecast(
        graphs=_graphs(plan, similar, pace),
        stages={name: _stage_s(name, s * pace.of_stage(name), same, similar) for name, s in estimated.items()},
        gates_memory_bytes=round(gates_memory or gates_memory_bytes(plan.memory, work)),
        builds=len(similar),
        headers_s=HEADERS_S * pace.compile if plan.cost_kind.startswith("inductor") and not similar else 0.0,
    )


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return when `workers` have ended all jobs, started longest first (Graham 1969)."""
    free_at = [0.0] * max(workers, 1)
    for length in sorted(seconds, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


@dataclass(frozen=True)
class Cluster:
    """Compiling on some machines, one graph on each at a time. `efficiency`: ideal time over time."""

    machines: int
    seconds: float
    efficiency: float
    machine_hours: float
    cost: float | None


def cluster(expected: Forecast, machines: int, price: float | None) -> list[Cluster]:
    """Return the time to compile on 1, 2, 4, ... and `machines` machines; `price` is that of a machine hour.

    The ideal is the sum of all graphs divided by the machines. Graphs that share subgraphs are assumed to find them.
    """
    seconds = [graph.seconds for graph in expected.graphs.values()]
    sizes = sorted({machines, *(1 << n for n in range(machines.bit_length()) if 1 << n <= machines)})
    result = []
    for count in sizes:
        span = makespan(seconds, count)
        hours = count * span / 3600
        cost = None if price is None else hours * price
        result.append(Cluster(count, span, sum(seconds) / count / span, hours, cost))
    return result


def _graphs(plan: Plan, builds: Sequence[PastBuild], pace: Pace) -> dict[str, GraphForecast]:
    everything = [graph for build in builds for graph in build.graphs]
    compiled = [graph for build in builds if build.estimates == ESTIMATES for graph in build.graphs]
    result = {}
    for spec in plan.graphs:
        digest = plan.graph_digest(spec)
        before = [graph for graph in everything if graph.graph == digest][:NEWEST]
        of_kind = [graph for graph in compiled if graph.kind == spec.kind]
        alike = of_kind if len(of_kind) >= ENOUGH else compiled
        ratio = _recent([graph.seconds / graph.estimated_s for graph in alike], SIMILAR)
        seconds = plan.compile_seconds(spec) * (ratio or pace.compile)
        result[spec.name] = GraphForecast(
            seconds=median(graph.seconds for graph in before) if before else seconds,
            memory_bytes=max((graph.memory_bytes for graph in before), default=plan.compile_memory(spec)),
            size_bytes=max((graph.size_bytes for graph in before), default=plan.graph_bytes(spec)),
            recorded=bool(before),
        )
    return result


def _stage_s(name: str, estimated_s: float, same: Sequence[PastBuild], similar: Sequence[PastBuild]) -> float:
    if name == REFERENCE and any(name in build.stages for build in same):
        return 0.0  # cached since
    recorded = _recent([build.stages[name] for build in same if name in build.stages])
    if recorded is not None:
        return recorded
    builds = [build for build in similar if build.estimates == ESTIMATES and build.stages.get(name, 0.0) >= LEAST_S]
    return estimated_s * (_recent([build.stages[name] / build.estimated[name] for build in builds]) or 1.0)


def _recent(values: Sequence[float], count: int = NEWEST) -> float | None:
    """Return the median of the first `count` values; None without any."""
    return median(values[:count]) if values else None
