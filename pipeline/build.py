"""START HERE: the stages of a build, in order, and how they are run.

    recipe -> sources -> plan -> lock -> shard -> compile (trace, AOT) -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so the next build completes one that was killed. A build without
changes only compares a stamp, without importing torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact.manifest import Artifact, read
from pipeline.artifact.verify import check_replaceable
from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.files.atomic import check_writable
from pipeline.plan.forecast import StageTime
from pipeline.progress import stage
from pipeline.recipe import Recipe, load
from pipeline.stages.settings import BuildSettings
from pipeline.stages.stamp import Stamp, build_lock, fingerprint

__all__ = ["BuildReport", "BuildSettings", "build", "run"]


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
    started = time.monotonic()
    stamp = Stamp(settings.cache, settings.out)
    with build_lock(stamp.lock_file, settings.log, f"another build of {settings.out}"):
        inputs = fingerprint(settings)  # taken before any input is read: later changes make the stamp stale
        if stamp.is_current(inputs):
            return BuildReport(settings.out, fresh=True, seconds=time.monotonic() - started)
        check_replaceable(settings.out)
        check_writable(settings.out.absolute().parent)
        stamp.clear()
        report = _run_stages(settings)
        stamp.record(inputs)
    return replace(report, seconds=time.monotonic() - started)


def _run_stages(settings: BuildSettings) -> BuildReport:
    """Run every stage, cheap checks first."""
    make_backend(settings.recipe.backend)  # an error that names its packages, if the imports below would fail
    # The stages import torch, which a build that finds nothing changed does not need.
    from pipeline.stages import checks
    from pipeline.stages.compile import compile_plan
    from pipeline.stages.package import Parts, package
    from pipeline.stages.shard import shard
    from pipeline.stages.took import timed

    recipe, log, progress = settings.recipe, settings.log, settings.progress
    backend = checks.usable_backend(recipe)
    checks.check_prompts(settings)
    with timed(settings) as took:
        with took.stage("sources"), stage("sources: target and draft", log, progress):
            sources = checks.resolved(settings, backend)
        plan, models = sources.plan, sources.pair
        checks.warn_of_generation(settings, models[0])
        pending = took.expect(plan)
        with took.stage("shard"):
            shards = shard(plan.pair.models, models, backend.packing, settings.cache, log, progress)
        checks.warn_of_cut_prompts(settings, sources.tokenizer)
        with took.stage("compile"):
            graphs = took.compiled = compile_plan(pending, log, progress)
        parts = Parts(plan, sources.lock, tuple(graphs), shards, sources.tokenizer, models[0].generation)
        with took.stage("package"), stage("package: graphs, weights and tokenizer", log, progress):
            artifact = package(settings.out, parts, backend, settings.cache)
        if settings.validate and checks.runs_here(backend, artifact, log):
            # Not above: it imports the reference models of transformers, which takes longer than a failed check.
            from pipeline.validate.run import validate

            with took.gates() as gates:
                gates.report = validate(artifact.root, *models, settings.base, settings.cache, log, progress)
    names = {hit: tuple(graph.spec.name for graph in graphs if graph.hit is hit) for hit in (False, True)}
    return BuildReport(settings.out, compiled=names[False], reused=names[True], stages=took.stages())
