"""The parts of the gates on the nodes of a cluster: references and what runs graphs (`validate/gates/parts.py`).

Checkpoints and the artifact come to a node through the shared cache, and goldens go back through it; answers and
scores, which are small, are the results of the tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifact.manifest import PairArtifact
from pipeline.backends.base import make_backend
from pipeline.cache.remote import Remote
from pipeline.executors.base import Task
from pipeline.plan.estimates import GATES, REFERENCE, gates_memory_bytes, reference_memory_bytes
from pipeline.plan.forecast import Forecast
from pipeline.progress import Log, duration
from pipeline.recipe.schema import Recipe
from pipeline.runtime.open import load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.stages.checks import Resolved
from pipeline.stages.node_files import (
    SentArtifact,
    SentPair,
    received_artifact,
    received_pair,
    send_artifact,
    send_pair,
)
from pipeline.stages.nodes import Cluster, facts, needs_gpu, node_cache, usable_node
from pipeline.stages.settings import BuildSettings
from pipeline.stages.took import work_of
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.parts import Elsewhere, GoldensPart, Part
from pipeline.validate.prompts import Prompt, load_prompts, prompts_path
from pipeline.validate.reference.goldens import GoldenStore, golden_store


@dataclass(frozen=True)
class Sent:
    """What all parts of a build's gates need: plain data, and files in the shared cache."""

    recipe: Recipe
    prompts: list[Prompt]
    pair: SentPair
    artifact: SentArtifact
    remote: Remote
    expected: Mapping[str, str]


@dataclass(frozen=True)
class PartJob:
    """A part of the gates for a node."""

    part: Part
    sent: Sent
    task: Task


@dataclass(frozen=True)
class PartResult:
    """What a part measured, its time on the node, and its messages and those of the shared cache."""

    name: str
    value: Any
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NodeInputs:
    """What goldens are computed from on a node (`gates.references.ReferenceInputs`)."""

    recipe: Recipe
    checkpoints: tuple[Checkpoint, Checkpoint]
    cache: GoldenStore
    log: Log


def gates_on(
    cluster: Cluster, settings: BuildSettings, sources: Resolved, expected: Forecast, artifact: PairArtifact
) -> Elsewhere:
    """Send checkpoints and an artifact to the shared cache; return what runs parts of its gates on the nodes.

    Raises:
        HostError: the shared cache cannot be written.

    """
    recipe, log = settings.recipe, settings.log
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, settings.base))
    pair = send_pair(cluster.remote, sources.pair, recipe, settings.base, log)
    here = facts(recipe.backend, make_backend(recipe.backend))
    sent = Sent(recipe, prompts, pair, send_artifact(cluster.remote, artifact, log), cluster.remote, here)

    def run(parts: Sequence[Part]) -> list[Any]:
        tasks = _tasks(parts, settings, sources, expected)
        jobs = [PartJob(part, sent, task) for part, task in zip(parts, tasks, strict=True)]
        left = [part.name for part in parts]

        def done(result: PartResult) -> None:
            left.remove(result.name)
            log(f"  {recipe.name}/{result.name}: {duration(result.seconds)}" + (f", {len(left)} left" if left else ""))
            for note in result.notes:
                log(f"    {note.strip()}")

        return [result.value for result in cluster.executor(task_of).run(run_on_node, jobs, done)]

    return Elsewhere(run, lambda: cluster.cores)  # a cluster that scales itself may have more by then


def task_of(job: PartJob) -> Task:
    """Return what a part needs of a node."""
    return job.task


def run_on_node(job: PartJob) -> PartResult:
    """Run a part of the gates on a node.

    Raises:
        HostError: the node differs from the machine of the build, or the shared cache cannot be read.

    """
    started, sent, cache, notes = time.monotonic(), job.sent, node_cache(), list[str]()
    usable_node(sent.recipe.backend, sent.expected)
    goldens = golden_store(cache, sent.remote, notes.append)
    pair = received_pair(sent.remote, sent.pair, cache)
    if isinstance(job.part, GoldensPart):
        value: Any = job.part.run(NodeInputs(sent.recipe, pair, goldens, notes.append))
    else:
        engine = load(received_artifact(sent.remote, sent.artifact, cache), share_prefixes=False)
        try:
            value = job.part.run(GateInputs(engine, sent.recipe, sent.prompts, pair, goldens, notes.append))
        finally:
            engine.close()
    return PartResult(job.part.name, value, time.monotonic() - started, tuple(notes))


def _tasks(parts: Sequence[Part], settings: BuildSettings, sources: Resolved, expected: Forecast) -> list[Task]:
    """Return what parts of one kind need: the cores and the memory of the plan, and their share of its time."""
    plan, logs = sources.plan, settings.cache / "logs" / settings.recipe.name
    total, tasks = sum(part.share for part in parts), []
    ranks = plan.pair.models.tp
    gates_bytes = gates_memory_bytes(plan.memory, work_of(settings), ranks)
    for part in parts:
        name, log_file = f"{settings.recipe.name}/{part.name}", logs / f"{part.name}.log"
        if isinstance(part, GoldensPart):
            memory_bytes = reference_memory_bytes(plan.pair, int(part.share))
            seconds = expected.stages.get(REFERENCE, 0.0) * part.share / total
            tasks.append(Task(name, log_file, seconds, 1.0, 0.0, memory_bytes))
        else:
            gpus = float(ranks) if needs_gpu(settings.recipe.backend) else 0.0
            seconds = expected.stages.get(GATES, 0.0) * part.share / total
            tasks.append(Task(name, log_file, seconds, float(ranks), gpus, gates_bytes))
    return tasks
