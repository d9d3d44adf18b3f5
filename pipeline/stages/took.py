"""The times of a build's stages beside what the plan expects; recorded for the next plan. Runs no stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.artifact.host import processor_flags
from pipeline.errors import HostError, no_string
from pipeline.plan.estimates import ESTIMATES, GATES, REFERENCE, Work, pace_of, stage_seconds
from pipeline.plan.forecast import Forecast, StageTime, forecast
from pipeline.plan.history import CompiledGraph, History, PastBuild, machine
from pipeline.plan.plan import Plan
from pipeline.progress import duration
from pipeline.stages.compile import Compiled
from pipeline.stages.settings import LOCAL, BuildSettings
from pipeline.stages.workers import peak_bytes
from pipeline.validate.prompts import recipe_prompts
from pipeline.validate.report.schema import Report

COMPILE = "compile"
STAGES = ("sources", "shard", COMPILE, "package", REFERENCE, GATES)
"""In their order."""


@dataclass
class Gates:
    """The report of gates that ran."""

    report: Report | None = None


@contextlib.contextmanager
def recorded(clock: BuildClock, graphs: Sequence[Compiled]) -> Iterator[None]:
    """Record the stages of a build that ended, and its graphs, for the next plan, also if a later stage fails."""
    try:
        yield
    finally:
        clock.record(graphs)


class BuildClock:
    """Times the stages of one build, beside what its plan expects."""

    forecast: Forecast

    def __init__(self, settings: BuildSettings) -> None:
        self._settings = settings
        self._history = History(settings.cache)
        self._seconds: dict[str, float] = {}
        self._expected: dict[str, float] = {}
        self._workers = 1
        self.work = work_of(settings)

    def plan(self, plan: Plan) -> None:
        """Forecast a plan."""
        self._plan = plan
        self.forecast = forecast(plan, self.work, self._history.builds(), pace_of(processor_flags()))

    def expect(self, missing: Sequence[str], workers: int) -> None:
        """Log what the stages that are left will take; `missing` graphs are to be compiled."""
        no_string(missing, "missing", "names")
        self._workers = workers
        self._expected = {**self.forecast.stages, COMPILE: self.forecast.compile_s(workers, missing)}
        left = {name: self._expected[name] for name in STAGES if name in self._expected and name not in self._seconds}
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in left.items())
        whole = f"about {duration(sum(self._expected.values()))}"
        self._settings.log(f"plan: {whole} (still to do: {listed}); {self.forecast.basis}")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started

    @contextlib.contextmanager
    def gates(self) -> Iterator[Gates]:
        """Time the gates, and apart from them the stage whose results are cached afterwards."""
        gates = Gates()
        with self.stage(GATES):
            yield gates
        reference_s = gates.report.provenance.seconds.get(REFERENCE, 0.0) if gates.report else 0.0
        self._seconds |= {GATES: self._seconds[GATES] - reference_s, REFERENCE: reference_s}

    def stages(self) -> dict[str, StageTime]:
        """Return expected and taken seconds of the stages that ran."""
        return {name: StageTime(round(self._expected[name], 1), round(s, 1)) for name, s in self._seconds.items()}

    def record(self, graphs: Sequence[Compiled]) -> None:
        """Store the stages that ended for the next plan; a failure is logged."""
        estimated = stage_seconds(self._plan.pair, self._plan.memory, self.work)
        here = self._settings.executor == LOCAL  # times of other machines say nothing of this one
        build = PastBuild(
            machine=machine(),
            plan=self._plan.digest(self.work),
            cost=self._plan.cost_kind,
            estimates=ESTIMATES,
            workers=self._workers,
            graphs=tuple(_recorded(self._plan, graph) for graph in graphs if not graph.hit and here),
            stages={name: round(seconds, 3) for name, seconds in self._seconds.items() if name in estimated},
            estimated={name: round(seconds, 3) for name, seconds in estimated.items()},
            gates_memory_bytes=peak_bytes() if GATES in self._seconds else 0,
        )
        try:
            self._history.add(build)
        except HostError as error:
            self._settings.log(f"the times of this build are not recorded: {error}")


def _recorded(plan: Plan, graph: Compiled) -> CompiledGraph:
    return CompiledGraph(
        graph=plan.graph_digest(graph.spec),
        kind=graph.spec.kind,
        estimated_s=plan.compile_seconds(graph.spec),
        seconds=round(graph.seconds, 3),
        memory_bytes=graph.memory_bytes,
        size_bytes=graph.size_bytes,
    )


def work_of(settings: BuildSettings) -> Work:
    """Return what the gates of a build will run."""
    rules = settings.recipe.validate_
    if not settings.validate:
        return Work(0)
    return Work(len(recipe_prompts(settings.recipe, settings.base)), rules.max_new_tokens)
