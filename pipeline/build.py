"""START HERE: the stages of a build, in order, and how they are run.

    recipe -> sources -> plan -> lock -> shard -> compile (trace, AOT) -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so the next build completes one that was killed. A build without
changes only compares a stamp, without importing torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact.manifest import Artifact, read
from pipeline.artifact.verify import check_replaceable
from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.files.atomic import check_writable
from pipeline.plan.lock import with_weights
from pipeline.progress import stage
from pipeline.recipe import Recipe, load
from pipeline.stages.settings import BuildSettings
from pipeline.stages.stamp import Stamp, build_lock, fingerprint

__all__ = ["BuildReport", "BuildSettings", "build", "run"]


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
    started = time.monotonic()
    stamp = Stamp(settings.cache, settings.out)
    with build_lock(stamp.lock_file, settings.log, f"another build of {settings.out}"):
        inputs = fingerprint(settings)  # taken before any input is read: later changes make the stamp stale
        if stamp.is_current(inputs):
            return BuildReport(settings.out, fresh=True, seconds=time.monotonic() - started)
        check_replaceable(settings.out)
        check_writable(settings.out.absolute().parent)
        stamp.clear()
        compiled, reused = _run_stages(settings)
        stamp.record(inputs)
    return BuildReport(settings.out, False, compiled, reused, time.monotonic() - started)


def _run_stages(settings: BuildSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Run every stage, cheap checks first; return the names of the compiled and of the cached graphs."""
    make_backend(settings.recipe.backend)  # an error that names its packages, if the imports below would fail
    # The stages import torch, which a build that finds nothing changed does not need.
    from pipeline.stages.checks import (
        check_prompts,
        resolved,
        runs_here,
        usable_backend,
        warn_of_cut_prompts,
        warn_of_generation,
    )
    from pipeline.stages.compile import CompileSettings, compile_plan
    from pipeline.stages.package import Parts, package
    from pipeline.stages.shard import shard

    recipe, log, progress = settings.recipe, settings.log, settings.progress
    backend = usable_backend(recipe)
    check_prompts(settings)
    with stage("sources: target and draft", log, progress):
        sources = resolved(settings, backend)
    plan = sources.plan
    warn_of_generation(settings, sources.pair[0])
    shards = shard(plan.pair.models, sources.pair, backend.packing, settings.cache, log, progress)
    warn_of_cut_prompts(settings, sources.tokenizer)
    graphs = compile_plan(plan, CompileSettings(settings.cache, settings.workers, settings.remote), log, progress)
    generation = sources.pair[0].generation
    lock = with_weights(sources.lock, *sources.pair, shards.found)
    parts = Parts(plan, lock, tuple(graphs), shards, sources.tokenizer, generation)
    with stage("package: graphs, weights and tokenizer", log, progress):
        artifact = package(settings.out, parts, backend, settings.cache)
    if settings.validate and runs_here(backend, artifact, log):
        # Not above: it imports the reference models of transformers, which takes longer than a failed check.
        from pipeline.validate.run import validate

        validate(artifact.root, *sources.pair, settings.base, settings.cache, log, progress)
    built = tuple(graph.spec.name for graph in graphs if not graph.hit)
    return built, tuple(graph.spec.name for graph in graphs if graph.hit)
