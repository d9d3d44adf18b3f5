"""The nodes of a Ray cluster, and the compiling of graphs on them; all files move through the shared cache.

A node has a local cache of its own: `$TANDEM_CACHE` of the node, or `~/.cache/tandem`. Its packages and compiler must
be those of this machine, because they are a part of every key.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backends.base import Backend, make_backend, package_of
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, PreflightError
from pipeline.executors.base import Task
from pipeline.files.home import expanded
from pipeline.progress import Log
from pipeline.recipe.backend_settings import BackendSettings, InductorSettings
from pipeline.stages.background import Background
from pipeline.stages.compile import Compiled, Job, SharedCache, compile_graph, remember, source_digest
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


@dataclass(frozen=True)
class Cluster:
    """The nodes of a connected cluster, and the shared cache through which they exchange files.

    `writer` does the work of this machine while nodes compile.
    """

    remote: Remote
    log: Log
    writer: Background

    @property
    def cores(self) -> int:
        """Cores of the nodes that are up."""
        return self.executor(task_of).cores

    def executor(self, describe: Callable[[Any], Task], second: Callable[[Any], Any] = lambda job: job) -> RayExecutor:
        """Return an executor of jobs of one kind."""
        from pipeline.executors.ray import RayExecutor  # keeps an extra out of other builds

        return RayExecutor(describe, self.log, second, self.writer.check)

    def compile(self, jobs: Sequence[Job], _: int, done: Callable[[Compiled], None]) -> list[Compiled]:
        """Compile jobs on the nodes, as `compile_on`."""
        return compile_on(self.executor(task_of, without_claims), jobs, done)


@contextmanager
def cluster_of(settings: BuildSettings) -> Iterator[Cluster | None]:
    """Connect to the cluster of a build; yields None for a build on this machine.

    Raises:
        HostError: no cluster answers, or its version differs.

    """
    if settings.executor == LOCAL:
        yield None
        return
    from pipeline.executors.ray import connected  # keeps an extra out of other builds

    assert settings.remote is not None
    remote = absolute(settings.remote)
    address = None if settings.executor == "ray" else settings.executor
    with Background() as writer, connected(address):
        yield Cluster(remote, settings.log, writer)


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
    custom = {COMPILER: 1.0} if job.backend.name == "neuron" else {}
    name = f"{job.recipe}/{job.spec.name}"
    return Task(name, job.log_file, job.seconds, 1.0, float(needs_gpu(job.backend)), job.memory_bytes, custom)


def needs_gpu(backend: BackendSettings) -> bool:
    """Return whether graphs of a backend need a GPU, to be compiled and to run."""
    return isinstance(backend, InductorSettings) and backend.device == "cuda"


def without_claims(node_job: NodeJob) -> NodeJob:
    """Return the job of a second run, which must not wait for the first."""
    return replace(node_job, job=replace(node_job.job, claim=False))


def compile_on_node(node_job: NodeJob) -> Compiled:
    """Compile a graph on a node, and make sure that the shared cache has it.

    Raises:
        HostError: the node lacks packages or differs from the machine that runs the build, or compiling failed.

    """
    job = replace(node_job.job, cache=node_cache())
    backend = usable_node(job.backend, node_job.toolchain)
    result = compile_graph(job)
    notes = list(result.notes)
    if result.hit:  # the node has it from an earlier build, perhaps with another shared cache
        shared = SharedCache(job, "graphs", backend, notes.append)
        if file := shared.local.get(result.key):
            shared.push(result.key, file)
    return replace(result, notes=tuple(notes))


def node_cache() -> Path:
    """Return the root of this node's local cache."""
    return expanded(os.environ.get("TANDEM_CACHE") or NODE_CACHE, "TANDEM_CACHE")


def usable_node(settings: BackendSettings, expected: Mapping[str, str]) -> Backend:
    """Return the backend on this node, after checking the requirements and that the facts are those expected.

    Raises:
        PreflightError: every missing requirement. HostError: every difference.

    """
    backend = make_backend(settings)
    if problems := backend.preflight():
        raise PreflightError(
            [replace(problem, where=f"node {platform.node()}: {problem.where}") for problem in problems]
        )
    check_same(expected, facts(settings, backend))
    return backend


def facts(settings: BackendSettings, backend: Backend) -> dict[str, str]:
    """Return what must be equal on all machines of a build: toolchain, flags, and the code that shapes graphs.

    Flags have variables of the environment that change code: a node would compile under keys of its own.
    """
    code = {"code of Tandem": source_digest(package_of(settings))[:12]}
    toolchain = backend.toolchain().as_dict()
    return toolchain | {name: value for name, value in backend.flags().items() if name not in toolchain} | code


def check_same(here: Mapping[str, str], node: Mapping[str, str]) -> None:
    """Compare the facts of the machine that runs the build with those of this node.

    Raises:
        HostError: every difference.

    """
    names = [name for name in {**here, **node} if here.get(name) != node.get(name)]
    if names:
        differences = "; ".join(f"{name}: {node.get(name)}, expected {here.get(name)}" for name in names)
        image = "give all nodes the image and the variables of the machine that runs the build"
        fix = f"{image}; for other processors set `backend.isa`"
        raise HostError(
            f"the node's toolchain or environment differs: {differences}", where=f"node {platform.node()}", fix=fix
        )


def _sent(job: Job) -> Job:
    """Return a job as a node needs it: nodes have another working directory."""
    assert job.remote is not None
    return replace(job, remote=absolute(job.remote), captured=True)


def absolute(remote: Remote) -> Remote:
    """Return a shared cache, if it is a folder by its absolute path."""
    return remote if "://" in remote.url else replace(remote, url=str(expanded(remote.url).absolute()))


def _fetch(job: Job, backend: Backend, result: Compiled) -> None:
    notes: list[str] = []
    if SharedCache(job, "graphs", backend, notes.append).get(result.key) is None:
        assert job.remote is not None
        what = "; ".join([f"the shared cache lacks {result.spec.name}, which a node compiled", *result.notes, *notes])
        raise HostError(what, where=job.remote.url, fix="check that the nodes can write it (credentials, mounts)")
    remember(job, backend, result.key)
