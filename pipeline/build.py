"""START HERE: the stages of a build, in order, and how they are run.

    recipe -> sources -> plan -> lock -> shard -> compile (trace, AOT) -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so the next build completes one that was killed. A build without
changes only compares a stamp, without importing torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact.manifest import Artifact, read
from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.errors import GateError
from pipeline.plan.forecast import StageTime
from pipeline.recipe import Recipe, load, located
from pipeline.stages.settings import BuildSettings, check_executor, check_together
from pipeline.stages.stamp import LockedBuild, locked_builds

__all__ = ["BuildReport", "BuildSettings", "build", "run", "run_all"]


@dataclass(frozen=True)
class BuildReport:
    """The result of a build. `fresh`: nothing had changed; `compiled`, `reused`: graphs; `stages`: their times."""

    artifact: Path
    fresh: bool = False
    compiled: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    seconds: float = 0.0
    stages: Mapping[str, StageTime] | None = None


def build(
    recipe: Recipe | Path | str, out: Path | None = None, *, base: Path | None = None, cache: Path | None = None,
    workers: int | None = None, validate: bool = True, locked: bool = False,
) -> Artifact:  # fmt: skip
    """Build a recipe, or the file or name of one, into `out` (default `artifacts/<name>`) and return the artifact.

    `base` is the folder that relative paths of the recipe start at: that of its file, or `recipes`. `run_build` with
    `BuildSettings` takes the rest: a shared cache, a lock elsewhere, callbacks for lines and progress.

    Raises:
        TandemError: wrong input, a missing tool, or a failed gate; what is finished stays cached.

    """
    folder = Path("recipes") if isinstance(recipe, Recipe) else located(recipe).parent
    parsed = recipe if isinstance(recipe, Recipe) else load(recipe)
    settings = BuildSettings(
        parsed, base or folder, out or Path("artifacts") / parsed.name, cache=cache or default_root(),
        workers=workers, validate=validate, locked=locked,
    )  # fmt: skip
    return read(run(settings).artifact)


def run(settings: BuildSettings) -> BuildReport:
    """Run the stages that are stale. Concurrent builds of one output take turns; the later ones find it up to date.

    Raises:
        TandemError: as `build`.

    """
    return run_all([settings])[0]


def run_all(builds: Sequence[BuildSettings]) -> list[BuildReport]:
    """Build several recipes, whose graphs are compiled through one queue; see `run`.

    The builds share the cache, the number of workers, the shared cache and the executor, which are those of the first.
    A recipe whose gates fail does not stop the others.

    Raises:
        TandemError: as `build`; recipes that cannot be built together; of several failed gates, the first.

    """
    started = time.monotonic()
    check_together(builds)
    check_executor(builds[0])
    with locked_builds(builds) as locked:
        stale = [one for one in locked if not one.is_current()]
        for one in stale:
            one.begin()
        reports = _run_stages(stale, started) if stale else {}
    fresh = BuildReport(Path(), fresh=True, seconds=time.monotonic() - started)
    return [reports.get(one.settings.out) or replace(fresh, artifact=one.settings.out) for one in locked]


def _run_stages(builds: Sequence[LockedBuild], started: float) -> dict[Path, BuildReport]:
    """Run every stage, cheap checks first; return the reports by output. Imports torch, as a fresh build does not."""
    for one in builds:
        make_backend(one.settings.recipe.backend)  # an error that names its packages, if the imports below would fail
    from pipeline.stages.background import Background
    from pipeline.stages.nodes import cluster_of
    from pipeline.stages.per_recipe import compile_together, finish, prepare

    reports, errors = {}, []
    with Background() as sender, cluster_of(builds[0].settings) as cluster:
        prepared = [prepare(one.settings, sender, cluster) for one in builds]  # sources, plan, lock, shard
        graphs = compile_together(prepared, cluster)
        for one, ready, compiled in zip(builds, prepared, graphs, strict=True):
            try:
                artifact = finish(ready, compiled, cluster)  # package, validate
            except GateError as error:
                errors.append(error)
                if len(builds) > 1:
                    one.settings.log(f"gates failed: {error}")
                continue
            one.record()
            built, reused = (tuple(graph.spec.name for graph in compiled if graph.hit is hit) for hit in (False, True))
            report = BuildReport(artifact, compiled=built, reused=reused, stages=ready.clock.stages())
            reports[one.settings.out] = replace(report, seconds=time.monotonic() - started)
    if errors:
        raise errors[0]
    return reports
