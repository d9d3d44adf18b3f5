"""START HERE: the stages of a build, in order, and how they are run.

    recipe -> sources -> plan -> lock -> shard -> compile (trace, AOT) -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so the next build completes one that was killed. A build without
changes only compares a stamp, without importing torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import Artifact, read
from pipeline.artifact.verify import check_replaceable
from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.errors import GateError, InputError
from pipeline.files.atomic import check_writable
from pipeline.recipe import Recipe, load
from pipeline.stages.settings import BuildSettings, check_executor
from pipeline.stages.stamp import Stamp, build_lock, fingerprint

__all__ = ["BuildReport", "BuildSettings", "build", "run", "run_all"]


@dataclass(frozen=True)
class BuildReport:
    """The result of a build. `fresh`: no input had changed. `compiled`, `reused`: graphs compiled, and from a cache."""

    artifact: Path
    fresh: bool = False
    compiled: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    seconds: float = 0.0


def build(
    recipe: Recipe | Path, out: Path | None = None, *, base: Path | None = None, cache: Path | None = None,
    workers: int | None = None, validate: bool = True, locked: bool = False,
) -> Artifact:  # fmt: skip
    """Build a recipe into the directory `out` (default `artifacts/<name>`) and return the artifact.

    `base` is the folder that relative paths of the recipe start at: that of its file, or `recipes`. `run` with
    `BuildSettings` takes the rest: a shared cache, a lock elsewhere, callbacks for lines and progress.

    Raises:
        TandemError: wrong input, a missing tool, or a failed gate; what is finished stays cached.

    """
    folder = recipe.parent if isinstance(recipe, Path) else Path("recipes")
    parsed = load(recipe) if isinstance(recipe, Path) else recipe
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
        InputError: two recipes of one name or output, or an executor that cannot be used.
        TandemError: as `build`; of several recipes with failed gates, the error of the first.

    """
    started = time.monotonic()
    _check_names(builds)
    check_executor(builds[0])
    with ExitStack() as locks:
        for settings in sorted(builds, key=lambda settings: settings.out.absolute()):
            lock = Stamp(settings.cache, settings.out).lock_file
            locks.enter_context(build_lock(lock, settings.log, f"another build of {settings.out}"))
        # The inputs are taken before any is read: later changes make the stamp stale.
        begun = [_Begun(settings, Stamp(settings.cache, settings.out), fingerprint(settings)) for settings in builds]
        stale = [one for one in begun if not one.stamp.is_current(one.inputs)]
        for one in stale:
            check_replaceable(one.settings.out)
            check_writable(one.settings.out.absolute().parent)
            one.stamp.clear()
        reports = _run_stages(stale, started) if stale else {}
    fresh = BuildReport(Path(), fresh=True, seconds=time.monotonic() - started)
    return [reports.get(one.settings.out) or replace(fresh, artifact=one.settings.out) for one in begun]


@dataclass(frozen=True)
class _Begun:
    """A build whose output is locked."""

    settings: BuildSettings
    stamp: Stamp
    inputs: dict[str, Any]


def _check_names(builds: Sequence[BuildSettings]) -> None:
    for what, values in (
        ("name", [settings.recipe.name for settings in builds]),
        ("output", [str(settings.out.absolute()) for settings in builds]),
    ):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            fix = "give each recipe a name of its own, and name each recipe once"
            raise InputError(f"two recipes have the same {what}: {twice[0]}", where="recipes", fix=fix)


def _run_stages(builds: Sequence[_Begun], started: float) -> dict[Path, BuildReport]:
    """Run every stage, cheap checks first; return the reports by output."""
    settings = builds[0].settings
    for one in builds:
        make_backend(one.settings.recipe.backend)  # an error that names its packages, if the imports below would fail
    # The stages import torch, which a build that finds nothing changed does not need.
    from pipeline.stages.compile import CompileSettings, compile_plans
    from pipeline.stages.nodes import compiler_of
    from pipeline.stages.per_recipe import finish, prepare

    with compiler_of(settings) as (workers, compile_jobs):
        prepared = [prepare(one.settings) for one in builds]
        shared = CompileSettings(settings.cache, workers, settings.remote)
        plans = [one.sources.plan for one in prepared]
        graphs = compile_plans(plans, shared, settings.log, settings.progress, compile_jobs)
    reports, errors = {}, []
    for one, ready, compiled in zip(builds, prepared, graphs, strict=True):
        try:
            artifact = finish(ready, compiled)
        except GateError as error:
            errors.append(error)
            if len(builds) > 1:
                one.settings.log(f"gates failed: {error}")
            continue
        one.stamp.record(one.inputs)
        built, reused = ([graph.spec.name for graph in compiled if graph.hit is hit] for hit in (False, True))
        seconds = time.monotonic() - started
        reports[one.settings.out] = BuildReport(artifact, False, tuple(built), tuple(reused), seconds)
    if errors:
        raise errors[0]
    return reports
