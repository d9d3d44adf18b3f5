"""The stages of a build: each recipe's sources and shards, the graphs of all, each recipe's package and gates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact.manifest import Manifest, read
from pipeline.backends.base import Backend
from pipeline.errors import ArtifactError, GateError
from pipeline.plan.lock import with_weights
from pipeline.progress import Progress, stage
from pipeline.stages.background import Background
from pipeline.stages.checks import (
    Resolved,
    check_prompts,
    resolved,
    runs_here,
    usable_backend,
    warn_of_cut_prompts,
    warn_of_generation,
)
from pipeline.stages.compile import Compiled, CompileQueue, CompileSettings
from pipeline.stages.draft_check import check_draft
from pipeline.stages.nodes import Cluster
from pipeline.stages.package import Parts, package
from pipeline.stages.send import check_registries, start_sending
from pipeline.stages.settings import BuildSettings
from pipeline.stages.shard import Shards, shard
from pipeline.stages.took import BuildClock, recorded


@dataclass(frozen=True)
class Prepared:
    """A recipe that lacks only its graphs."""

    settings: BuildSettings
    backend: Backend
    sources: Resolved
    shards: Callable[[], Shards]
    clock: BuildClock
    sent: list[Callable[[], None]]
    """Functions that wait until the shards were sent to each registry, empty until they are written."""


def prepare(settings: BuildSettings, sender: Background, cluster: Cluster | None = None) -> Prepared:
    """Check a recipe, fetch its sources, plan, and write the shards; cheap checks first.

    With a cluster, this machine writes the shards while nodes compile. `sender` then sends them.

    Raises:
        TandemError: wrong input or a missing tool.

    """
    log, progress = settings.log, settings.progress
    backend = usable_backend(settings.recipe)
    check_prompts(settings)
    check_registries(settings)
    clock, sent = BuildClock(settings), list[Callable[[], None]]()
    with clock.stage("sources"), stage("sources: target and draft", log, progress):
        sources = resolved(settings, backend)
        check_draft(settings, sources)
    clock.plan(sources.plan)
    warn_of_generation(settings, sources.pair[0])

    def sharded(progress: Progress) -> Shards:
        with clock.stage("shard"):
            shards = shard(sources.plan.pair.models, sources.pair, backend.packing, settings.cache, log, progress)
        sent.extend(start_sending(sender, settings, shards))
        return shards

    shards = done(sharded(progress)) if cluster is None else cluster.writer.start(sharded)
    warn_of_cut_prompts(settings, sources.tokenizer)
    return Prepared(settings, backend, sources, shards, clock, sent)


def done(shards: Shards) -> Callable[[], Shards]:
    """Return shards that are written already."""
    return lambda: shards


def compile_together(builds: Sequence[Prepared], cluster: Cluster | None) -> list[list[Compiled]]:
    """Compile the graphs of all builds through one queue; say first what the builds will take.

    Raises:
        HostError: the first failure, with the graph and its log.

    """
    settings = builds[0].settings
    planned = [(one.sources.plan, one.clock.forecast) for one in builds]
    workers = cluster.cores if cluster else settings.workers
    queue = CompileQueue(planned, CompileSettings(settings.cache, workers, settings.remote))
    with contextlib.ExitStack() as clocks:
        for one in builds:
            one.clock.expect([job.spec.name for job in queue.missing(one.sources.plan)], queue.workers)
            clocks.enter_context(one.clock.stage("compile"))
        return queue.run(settings.log, settings.progress, cluster.compile if cluster else None)


def finish(prepared: Prepared, graphs: Sequence[Compiled], cluster: Cluster | None = None) -> Path:
    """Package a recipe's artifact and run its gates; return the artifact's directory.

    Raises:
        GateError: a gate failed.
        HostError: no space, or a cached graph is missing.

    """
    with recorded(prepared.clock, graphs), naming_replaced(prepared.settings):
        return _finish(prepared, graphs, cluster)


@contextlib.contextmanager
def naming_replaced(settings: BuildSettings) -> Iterator[None]:
    """If a gate fails in the block, which replaces the artifact in `settings.out`, log what lies there, and what did.

    Raises:
        GateError: as the block.

    """
    before = _manifest(settings.out)
    try:
        yield
    except GateError:
        after = _manifest(settings.out)
        if before and before.passed and after and before.version != after.version:
            urls = [place.to for place in settings.recipe.publish] or ["REGISTRY"]
            pull = f"if it was published: tandem pull {urls[0]}/{before.name}@{before.version}"
            what = f"{settings.out} has the new artifact {after.version}, which failed its gates"
            settings.log(f"warning: {what}; it replaced {before.version}, which passed them; {pull}")
        raise


def _manifest(out: Path) -> Manifest | None:
    """Return the manifest of the artifact in a folder; None for any other content."""
    try:
        return read(out).manifest
    except ArtifactError:
        return None


def _finish(prepared: Prepared, graphs: Sequence[Compiled], cluster: Cluster | None) -> Path:
    settings, sources, clock = prepared.settings, prepared.sources, prepared.clock
    log, progress = settings.log, settings.progress
    generation = sources.pair[0].generation
    shards = prepared.shards()
    lock = with_weights(sources.lock, *sources.pair, shards.found)
    parts = Parts(sources.plan, lock, tuple(graphs), shards, sources.tokenizer, generation)
    with clock.stage("package"), stage("package: graphs, weights and tokenizer", log, progress):
        artifact = package(settings.out, parts, prepared.backend, settings.cache)
    if settings.validate and runs_here(prepared.backend, artifact, log):
        # Not above: it imports the reference models of transformers, which takes longer than a failed check.
        from pipeline.stages.node_gates import gates_on
        from pipeline.validate.reference.goldens import golden_store
        from pipeline.validate.run import validate

        goldens = golden_store(settings.cache, settings.remote, log)
        with clock.gates() as gates:
            nodes = None if cluster is None else gates_on(cluster, settings, sources, clock.forecast, artifact)
            gates.report = validate(artifact.root, sources.pair, settings.base, goldens, log, progress, nodes)
    for wait in prepared.sent:
        wait()
    return artifact.root
