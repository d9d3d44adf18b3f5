"""Compile the graphs of a build on the nodes of a Ray cluster, which exchange them through the shared cache.

A node has a local cache of its own: `$TANDEM_CACHE` of the node, or `~/.cache/tandem`. Its packages and compiler must
be those of this machine, because they are a part of every key.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.backends.base import Backend, make_backend, package_of
from pipeline.errors import HostError, PreflightError
from pipeline.executors.base import Task
from pipeline.files.home import expanded
from pipeline.recipe.schema import BackendSettings, InductorSettings
from pipeline.stages.compile import Compiled, CompileJobs, Job, SharedCache, compile_graph, remember, source_digest
from pipeline.stages.settings import LOCAL, BuildSettings

if TYPE_CHECKING:
    from pipeline.executors.ray import RayExecutor

NODE_CACHE = "~/.cache/tandem"
COMPILER = "neuronx-cc"
"""Custom resource of nodes that have Neuron's compiler: as many as compile at a time."""


@dataclass(frozen=True)
class NodeJob:
    """A job for a node, and this machine's toolchain, which must be that of the node."""

    job: Job
    toolchain: Mapping[str, str]


@contextmanager
def compiler_of(settings: BuildSettings) -> Iterator[tuple[int | None, CompileJobs | None]]:
    """Yield the number of jobs at a time, and what compiles them: None for workers of this machine.

    Raises:
        HostError: no cluster answers, or its version differs.

    """
    if settings.executor == LOCAL:
        yield settings.workers, None
        return
    from pipeline.executors.ray import RayExecutor, connected  # keeps an extra out of other builds

    with connected(None if settings.executor == "ray" else settings.executor):
        ray = RayExecutor(task_of, settings.log, without_claims)
        yield ray.cores, lambda jobs, _, done: compile_on(ray, jobs, done)


def compile_on(ray: RayExecutor, jobs: Sequence[Job], done: Callable[[Compiled], None]) -> list[Compiled]:
    """Compile jobs on the nodes; fetch each graph into the local cache when its job ends.

    Raises:
        HostError: a node differs from this machine, a job failed, or the shared cache lacks a graph.

    """
    by_name = {(job.recipe, job.spec.name): job for job in jobs}
    backends = {job.recipe: make_backend(job.backend) for job in jobs}

    def fetched(result: Compiled) -> None:
        job = by_name[result.recipe, result.spec.name]
        _fetch(job, backends[job.recipe], result)
        done(result)

    sent = [NodeJob(_sent(job), facts(job.backend, backends[job.recipe])) for job in jobs]
    return ray.run(compile_on_node, sent, fetched)


def task_of(node_job: NodeJob) -> Task:
    """Return what a job needs of a node: a core, the memory of the plan, and the backend's compiler or GPU."""
    job = node_job.job
    needs_gpu = isinstance(job.backend, InductorSettings) and job.backend.device == "cuda"
    custom = {COMPILER: 1.0} if job.backend.name == "neuron" else {}
    name = f"{job.recipe}/{job.spec.name}"
    return Task(name, job.log_file, job.seconds, 1.0, float(needs_gpu), job.memory_bytes, custom)


def without_claims(node_job: NodeJob) -> NodeJob:
    """Return the job of a second run, which must not wait for the first."""
    return replace(node_job, job=replace(node_job.job, claim=False))


def compile_on_node(node_job: NodeJob) -> Compiled:
    """Compile a graph on a node, and make sure that the shared cache has it.

    Raises:
        HostError: the node lacks packages or differs from the machine that runs the build, or compiling failed.

    """
    job = replace(node_job.job, cache=expanded(os.environ.get("TANDEM_CACHE") or NODE_CACHE, "TANDEM_CACHE"))
    backend = make_backend(job.backend)
    if problems := backend.preflight():
        raise PreflightError(
            [replace(problem, where=f"node {platform.node()}: {problem.where}") for problem in problems]
        )
    check_same(node_job.toolchain, facts(job.backend, backend))
    result = compile_graph(job)
    notes = list(result.notes)
    if result.hit:  # the node has it from an earlier build, perhaps with another shared cache
        shared = SharedCache(job, "graphs", backend, notes.append)
        if file := shared.local.get(result.key):
            shared.push(result.key, file)
    return replace(result, notes=tuple(notes))


def facts(settings: BackendSettings, backend: Backend) -> dict[str, str]:
    """Return what must be equal on all machines of a build: the toolchain, and the code that shapes graphs."""
    return backend.toolchain().as_dict() | {"code of Tandem": source_digest(package_of(settings))[:12]}


def check_same(here: Mapping[str, str], node: Mapping[str, str]) -> None:
    """Compare the facts of the machine that runs the build with those of this node.

    Raises:
        HostError: every difference.

    """
    names = [name for name in {**here, **node} if here.get(name) != node.get(name)]
    if names:
        differences = "; ".join(f"{name}: {node.get(name)}, expected {here.get(name)}" for name in names)
        fix = "give all nodes the image of the machine that runs the build; for other processors set `backend.isa`"
        raise HostError(f"the node's toolchain differs: {differences}", where=f"node {platform.node()}", fix=fix)


def _sent(job: Job) -> Job:
    """Return a job as a node needs it: nodes have another working directory."""
    assert job.remote is not None
    url = job.remote.url
    place = url if "://" in url else str(expanded(url).absolute())
    return replace(job, remote=replace(job.remote, url=place), captured=True)


def _fetch(job: Job, backend: Backend, result: Compiled) -> None:
    notes: list[str] = []
    if SharedCache(job, "graphs", backend, notes.append).get(result.key) is None:
        assert job.remote is not None
        what = "; ".join([f"the shared cache lacks {result.spec.name}, which a node compiled", *result.notes, *notes])
        raise HostError(what, where=job.remote.url, fix="check that the nodes can write it (credentials, mounts)")
    remember(job, backend, result.key)
