"""The compile stage: trace, key, and compile the graphs that the cache lacks, in worker processes.

The unit of work, `compile_graph`, runs anywhere that has the toolchain and the cache; an executor decides where.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache as memoize
from functools import partial
from pathlib import Path

from pipeline.backends.base import Backend, Traced, cache_key, make_backend, package_of
from pipeline.cache.local import Cache, Kind
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, TandemError, reason
from pipeline.executors.local import LocalExecutor
from pipeline.files.atomic import link_or_copy
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.plan.forecast import Forecast, makespan
from pipeline.plan.plan import Plan
from pipeline.progress import Log, Progress, duration, no_log
from pipeline.recipe.schema import BackendSettings
from pipeline.stages.settings import BuildSettings
from pipeline.stages.workers import output_to, peak_bytes, worker_count

SHAPING = ("models", "speculation", "graphs", "backends/base.py")
"""Parts of this package that shape a graph, in addition to the package of its backend."""


@dataclass(frozen=True)
class Job:
    """One graph to compile: plain data that can be sent to another process or machine."""

    spec: GraphSpec
    pair: PairSpec
    backend: BackendSettings
    cache: Path
    log_file: Path
    remote: Remote | None = None


@dataclass(frozen=True)
class Compiled:
    """A graph in the cache. `hit`: found in the local or the shared cache; `notes`: messages of the shared cache.

    `memory_bytes`: peak of the worker that compiled it, with its compilers.
    """

    spec: GraphSpec
    key: str
    hit: bool
    seconds: float
    notes: tuple[str, ...] = ()
    memory_bytes: int = 0
    size_bytes: int = 0


class Pending:
    """The graphs of a plan: those in the local cache, and a job for each that is missing, the longest first."""

    def __init__(self, plan: Plan, expected: Forecast, settings: BuildSettings) -> None:
        self.graphs, self.logs = plan.graphs, settings.cache / "logs" / plan.recipe.name
        jobs = [
            Job(spec, plan.pair, plan.recipe.backend, settings.cache, self.logs / f"{spec.name}.log", settings.remote)
            for spec in plan.graphs
        ]
        self.expected = expected
        self.cached = {hit.spec.name: hit for job in jobs if (hit := cached(job))}
        missing = [job for job in jobs if job.spec.name not in self.cached]
        self.missing = sorted(missing, key=lambda job: -expected.graphs[job.spec.name].seconds)
        memory_bytes = max((expected.graphs[job.spec.name].memory_bytes for job in missing), default=0)
        self.workers = settings.workers or worker_count(memory_bytes, max(len(missing), 1))

    @property
    def names(self) -> list[str]:
        """Names of the missing graphs."""
        return [job.spec.name for job in self.missing]


def compile_plan(pending: Pending, log: Log, progress: Progress) -> list[Compiled]:
    """Compile every graph of a plan that the cache lacks; log each result and the remaining time.

    Raises:
        HostError: the first failure, with the graph and its log. Graphs already compiled stay in the cache.

    """
    results, missing, count = dict(pending.cached), pending.missing, len(pending.graphs)
    tally = _Tally(pending)
    what = f"{len(missing)} of {count} graphs, {pending.workers} at a time, {tally.remaining()}; logs in {pending.logs}"
    log(f"compile: {what}" if missing else f"compile: all {count} graphs are cached")

    def ended(result: Compiled) -> None:
        results[result.spec.name] = result
        tally.end(result)
        progress("compile", count - len(tally.seconds_left), count)
        log(tally.line(result))
        for note in result.notes:
            log(f"    {note}")

    if missing:
        started = time.monotonic()
        progress("compile", len(results), count)
        compile_all(missing, pending.workers, ended)
        hits = sum(result.hit for result in results.values())
        took = duration(time.monotonic() - started)
        log(f"compile: {count - hits} graphs compiled, {hits} from the cache ({took})")
    return [results[spec.name] for spec in pending.graphs]


class _Tally:
    """The graphs left to compile, with estimated times; times of finished graphs correct the other estimates."""

    def __init__(self, pending: Pending) -> None:
        self.seconds_left = {name: pending.expected.graphs[name].seconds for name in pending.names}
        self.workers = pending.workers
        self.estimated_s = self.taken_s = 0.0

    def end(self, result: Compiled) -> None:
        """Remove a finished graph, and correct the estimates by its time."""
        estimated_s = self.seconds_left.pop(result.spec.name)
        if not result.hit:
            self.estimated_s, self.taken_s = self.estimated_s + estimated_s, self.taken_s + result.seconds

    def remaining(self) -> str:
        """Return the remaining time, corrected by the times of finished graphs, which include other load."""
        slower = self.taken_s / self.estimated_s if self.estimated_s else 1.0
        return f"about {duration(slower * makespan(self.seconds_left.values(), self.workers))}"

    def line(self, result: Compiled) -> str:
        """Return the log line of a finished graph."""
        how = "cached" if result.hit else duration(result.seconds)
        remaining = f", {len(self.seconds_left)} left, {self.remaining()}" if self.seconds_left else ""
        return f"  {result.spec.name}: {how}{remaining}"


def compile_all(jobs: Sequence[Job], workers: int, done: Callable[[Compiled], None]) -> list[Compiled]:
    """Compile every job, `workers` at a time in processes of their own; `done` is called as each ends.

    Raises:
        HostError: the first failure, with the graph and its log. Graphs already compiled stay in the cache.

    """
    preload = make_backend(jobs[0].backend).preload if jobs else ()
    return LocalExecutor(workers, preload).run(compile_graph, jobs, done)


def cached(job: Job) -> Compiled | None:
    """Return a graph of the local cache by its memo, without tracing; None if it has to be traced."""
    key = _memoised_key(job, _memo_key(job, make_backend(job.backend)))
    return None if key is None else Compiled(job.spec, key, hit=True, seconds=0.0)


def compile_graph(job: Job) -> Compiled:
    """Trace, look up, compile on a miss. Concurrent calls for one key compile once.

    A memo from (graph, package source, toolchain) to the key avoids tracing while the inputs of the graph are
    unchanged.
    """
    started = time.monotonic()
    memos = Cache(job.cache, "memos")
    backend = make_backend(job.backend)
    memo = _memo_key(job, backend)
    notes: list[str] = []
    key, hit = _memoised_key(job, memo), True
    if key is None:
        with memos.lock(memo), output_to(job.log_file):
            key = _memoised_key(job, memo)  # another build may have compiled it while this one waited
            if key is None:
                key, hit = _trace_and_compile(job, backend, notes)
                memos.put(memo, key.encode())
    seconds, size_bytes = time.monotonic() - started, Cache(job.cache, "graphs").size_bytes(key)
    return Compiled(job.spec, key, hit, seconds, tuple(notes), 0 if hit else peak_bytes(), size_bytes)


def _memoised_key(job: Job, memo: str) -> str | None:
    """Return the key in a memo if the cache has its graph, undamaged."""
    memo_file = Cache(job.cache, "memos").get(memo)
    if memo_file is None:
        return None
    key = memo_file.read_text(encoding="ascii")
    return key if Cache(job.cache, "graphs").get(key) is not None else None


def _trace_and_compile(job: Job, backend: Backend, notes: list[str]) -> tuple[str, bool]:
    """Look in the local, then in the shared cache; compile on a miss, and push the graph to the shared cache."""
    graphs = SharedCache(job, "graphs", backend, notes.append)
    traced = backend.trace(job.spec, job.pair)
    key = cache_key(traced, backend.toolchain(), backend.flags())
    with graphs.local.lock(key):
        if graphs.get(key) is not None:
            return key, True
        with tempfile.TemporaryDirectory(prefix="tandem-compile-") as work:
            objects = compiled_subgraphs(job, backend, traced, Path(work), notes.append)
            graphs.put(key, _compile(job, partial(backend.compile, traced, Path(work), objects)))
    return key, False


def compiled_subgraphs(job: Job, backend: Backend, traced: Traced, work: Path, log: Log = no_log) -> Path | None:
    """Return a folder with the object files of a graph's subgraphs, compiled on a miss; None for a graph without any.

    Subgraphs that other workers are compiling are left to the end.
    """
    if not traced.subgraphs:
        return None
    cache = SharedCache(job, "subgraphs", backend, log)
    folder = work / "subgraphs"
    folder.mkdir()
    keys = {subgraph.name: cache_key(subgraph, backend.toolchain(), backend.flags()) for subgraph in traced.subgraphs}
    waiting = list(traced.subgraphs)
    for is_last_pass in (False, True):
        for subgraph in tuple(waiting):
            key = keys[subgraph.name]
            with cache.local.lock(key, wait=is_last_pass) as locked:
                if locked:
                    file = cache.get(key)
                    if file is None:
                        with tempfile.TemporaryDirectory(prefix="tandem-subgraph-") as own:
                            data = _compile(job, partial(backend.compile_subgraph, subgraph, Path(own)))
                        file = cache.put(key, data)
                    link_or_copy(file, folder / f"{subgraph.name}.o")
                    waiting.remove(subgraph)
    return folder


class SharedCache:
    """Compiled code of one kind: the local cache, and behind it the shared one, if the build has one."""

    def __init__(self, job: Job, kind: Kind, backend: Backend, log: Log) -> None:
        self.local = Cache(job.cache, kind)
        self._remote = job.remote.open(kind, log) if job.remote else None
        self._toolchain = backend.toolchain().as_dict()

    def get(self, key: str) -> Path | None:
        """Return the file under `key`, fetched from the shared cache if the local one lacks it; None for a miss."""
        file = self.local.get(key)
        if file is None and self._remote and self._remote.fetch(key, self._toolchain, self.local):
            file = self.local.get(key)
        return file

    def put(self, key: str, data: bytes) -> Path:
        """Store compiled code in both."""
        file = self.local.put(key, data, self._toolchain)
        if self._remote:
            self._remote.push(key, file, self._toolchain)
        return file


def _compile(job: Job, run: Callable[[], bytes]) -> bytes:
    try:
        return run()
    except Exception as error:
        traceback.print_exc()  # into the log file, with the compiler's whole output
        if isinstance(error, TandemError) and error.fix:
            raise
        what = error.what if isinstance(error, TandemError) else reason(error)
        fix = f"the command and its whole output are in {job.log_file}"
        raise HostError(what, where=f"compile {job.spec.name}", fix=fix) from error


def _memo_key(job: Job, backend: Backend) -> str:
    facts = {
        "spec": asdict(job.spec),
        "pair": asdict(job.pair),
        "toolchain": backend.toolchain().as_dict(),
        "flags": backend.flags(),
        "source": source_digest(package_of(job.backend)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def shaping_files(backend_package: str) -> list[Path]:
    """Return the files of this package that shape a backend's graphs, by its package (`pipeline.backends.inductor`)."""
    root = Path(__file__).parents[1]
    parts = (*SHAPING, backend_package.removeprefix("pipeline.").replace(".", "/"))
    paths = [root / part for part in parts]
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@memoize
def source_digest(backend_package: str) -> str:
    """Return the sha256 over the files of this package that shape a backend's graphs."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in shaping_files(backend_package):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
