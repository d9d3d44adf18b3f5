"""The stages of one recipe before and after its graphs are compiled: sources and shards; package and gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.backends.base import Backend
from pipeline.progress import stage
from pipeline.stages.checks import (
    Resolved,
    check_prompts,
    resolved,
    runs_here,
    usable_backend,
    warn_of_cut_prompts,
    warn_of_generation,
)
from pipeline.stages.compile import Compiled
from pipeline.stages.package import Parts, package
from pipeline.stages.settings import BuildSettings
from pipeline.stages.shard import Shards, shard


@dataclass(frozen=True)
class Prepared:
    """A recipe that lacks only its graphs."""

    settings: BuildSettings
    backend: Backend
    sources: Resolved
    shards: Shards


def prepare(settings: BuildSettings) -> Prepared:
    """Check a recipe, fetch its sources, plan, and write the shards; cheap checks first.

    Raises:
        TandemError: wrong input or a missing tool.

    """
    log, progress = settings.log, settings.progress
    backend = usable_backend(settings.recipe)
    check_prompts(settings)
    with stage("sources: target and draft", log, progress):
        sources = resolved(settings, backend)
    warn_of_generation(settings, sources.pair[0])
    shards = shard(sources.plan.pair.models, sources.pair, backend.packing, settings.cache, log, progress)
    warn_of_cut_prompts(settings, sources.tokenizer)
    return Prepared(settings, backend, sources, shards)


def finish(prepared: Prepared, graphs: Sequence[Compiled]) -> Path:
    """Package a recipe's artifact and run its gates; return the artifact's directory.

    Raises:
        GateError: a gate failed.
        HostError: no space, or a cached graph is missing.

    """
    settings, sources = prepared.settings, prepared.sources
    log, progress = settings.log, settings.progress
    generation = sources.pair[0].generation
    parts = Parts(sources.plan, sources.lock, tuple(graphs), prepared.shards, sources.tokenizer, generation)
    with stage("package: graphs, weights and tokenizer", log, progress):
        artifact = package(settings.out, parts, prepared.backend, settings.cache)
    if settings.validate and runs_here(prepared.backend, artifact, log):
        # Not above: it imports the reference models of transformers, which takes longer than a failed check.
        from pipeline.validate.run import validate

        validate(artifact.root, *sources.pair, settings.base, settings.cache, log, progress)
    return artifact.root
