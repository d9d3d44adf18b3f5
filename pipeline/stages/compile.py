"""Plan -> compiled graphs in the cache: trace, key, and compile what the cache lacks, in worker processes.

The unit of work, `compile_graph`, runs anywhere that has the toolchain and the cache; an executor decides where.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Any

from pipeline.backends.base import Backend, Traced, cache_key, make_backend
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, TandemError
from pipeline.executors.local import LocalExecutor
from pipeline.graphs.spec import GraphSpec, PairSpec

SHAPING = ("models", "speculation", "graphs", "backends/base.py")
"""Parts of this package that decide what a graph computes, beside its own backend."""


@dataclass(frozen=True)
class Job:
    """One graph to compile: plain data, so that it can travel to another process or machine."""

    spec: GraphSpec
    pair: PairSpec
    backend: dict[str, Any]
    cache: str
    log_file: str
    remote: Remote | None = None


@dataclass(frozen=True)
class Compiled:
    """A graph in the cache. `hit` says that it was already there, or in the shared one; `notes` what went wrong."""

    spec: GraphSpec
    key: str
    hit: bool
    seconds: float
    notes: tuple[str, ...] = ()


def cached(job: Job) -> Compiled | None:
    """A graph that the local cache has, found by its memo, without tracing; None if it has to be traced."""
    key = _known(Cache(Path(job.cache)), _memo_key(job, make_backend(job.backend)))
    return None if key is None else Compiled(job.spec, key, hit=True, seconds=0.0)


def compile_graph(job: Job) -> Compiled:
    """Trace, look up, compile on a miss. Concurrent calls for one key compile once.

    A memo from (graph, package source, toolchain) to the key spares the tracing when nothing that shapes the graph
    has changed.
    """
    started = time.monotonic()
    store = Cache(Path(job.cache))
    backend = make_backend(job.backend)
    memo = _memo_key(job, backend)
    notes: list[str] = []
    key, hit = _known(store, memo), True
    if key is None:
        with store.lock(memo), _logged(Path(job.log_file)):
            key = _known(store, memo)  # another build may have compiled it while this one waited
            if key is None:
                key, hit = _trace_and_compile(job, backend, store, notes)
                store.put(memo, key.encode())
    return Compiled(job.spec, key, hit, time.monotonic() - started, tuple(notes))


def _known(store: Cache, memo: str) -> str | None:
    """The key that a memo names, if the graph is there, whole."""
    noted = store.get(memo)
    if noted is None:
        return None
    key = noted.read_text()
    return key if store.get(key) is not None else None


def _trace_and_compile(job: Job, backend: Backend, store: Cache, notes: list[str]) -> tuple[str, bool]:
    """The shared cache is asked after the local one, and given what was compiled."""
    traced = backend.trace(job.spec, job.pair)
    key = cache_key(traced, backend.toolchain(), backend.flags())
    toolchain = backend.toolchain().as_dict()
    remote = job.remote.open(notes.append) if job.remote else None
    with store.lock(key):
        if store.get(key) is not None or (remote and remote.fetch(key, toolchain, store)):
            return key, True
        with tempfile.TemporaryDirectory(prefix="tandem-compile-") as work:
            made = store.put(key, _compile(job, backend, traced, Path(work)), toolchain)
        if remote:
            remote.push(key, made, toolchain)
    return key, False


def _compile(job: Job, backend: Backend, traced: Traced, work: Path) -> bytes:
    try:
        return backend.compile(traced, work)
    except TandemError:
        raise
    except Exception as error:
        raise HostError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            where=f"compile {job.spec.name}",
            fix=f"the compiler's output is in {job.log_file}",
        ) from error


def compile_all(jobs: Sequence[Job], workers: int, done: Callable[[Compiled], None]) -> list[Compiled]:
    """Compile every job, `workers` at a time in processes of their own; `done` is called as each ends.

    Raises:
        HostError: the first failure, with the graph and its log. Graphs already compiled stay in the cache.

    """
    return LocalExecutor(workers).run(compile_graph, jobs, done)


def worker_count(graph_memory_bytes: int, graphs: int) -> int:
    """As many workers as cores and free memory allow."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), free // max(graph_memory_bytes, 1), graphs))


@contextlib.contextmanager
def _logged(log_file: Path) -> Iterator[None]:
    """Send this process's output to `log_file`, native code included."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in enumerate(saved, start=1):
                os.dup2(copy, target)
                os.close(copy)


def _memo_key(job: Job, backend: Backend) -> str:
    facts = {
        "spec": asdict(job.spec),
        "pair": asdict(job.pair),
        "toolchain": backend.toolchain().as_dict(),
        "flags": backend.flags(),
        "source": source_digest(job.backend["name"]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@memoize
def source_digest(backend: str) -> str:
    """sha256 over the parts of this package that shape a backend's graphs."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for part in (*SHAPING, f"backends/{backend}"):
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
