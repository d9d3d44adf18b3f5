"""The compile stage: trace, key, and compile the graphs that the cache lacks, in worker processes.

The unit of work, `compile_graph`, runs anywhere that has the toolchain and the cache; an executor decides where.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache as memoize
from functools import partial
from pathlib import Path

from pipeline.backends.base import Backend, Traced, TracedSubgraph, cache_key, make_backend, package_of
from pipeline.cache.backed import BackedCache
from pipeline.cache.claims import claimed
from pipeline.cache.local import Cache, Kind
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, TandemError, reason
from pipeline.executors.local import LocalExecutor
from pipeline.executors.output import output_to
from pipeline.files.atomic import link_or_copy
from pipeline.files.unfinished import work_folder
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.plan.forecast import Forecast, makespan
from pipeline.plan.plan import Plan
from pipeline.progress import Log, Progress, duration, no_log
from pipeline.recipe.backend_settings import BackendSettings
from pipeline.stages.workers import peak_bytes, worker_count

SHAPING = ("models", "speculation", "graphs", "backends/base.py")
"""Parts of this package that shape a graph, in addition to the package of its backend."""


@dataclass(frozen=True)
class Job:
    """One graph to compile: plain data that can be sent to another process or machine.

    `seconds` and `memory_bytes` are the plan's estimates. `captured`: the executor writes the output to `log_file`.
    `claim`: wait for another machine that compiles the same for the shared cache.
    """

    spec: GraphSpec
    pair: PairSpec
    backend: BackendSettings
    cache: Path
    log_file: Path
    remote: Remote | None = None
    recipe: str = ""
    seconds: float = 0.0
    memory_bytes: int = 0
    captured: bool = False
    claim: bool = True


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
    recipe: str = ""
    memory_bytes: int = 0
    size_bytes: int = 0


CompileJobs = Callable[[Sequence[Job], int, Callable[[Compiled], None]], list[Compiled]]
"""As `compile_all`: compiles jobs, as many at a time as the number, and calls a function as each ends."""


@dataclass(frozen=True)
class CompileSettings:
    """The local and the shared cache, and the number of workers (None: as many as fit)."""

    cache: Path
    workers: int | None = None
    remote: Remote | None = None


class CompileQueue:
    """The graphs of several plans, through one queue: those that the cache lacks, the longest first."""

    def __init__(self, planned: Sequence[tuple[Plan, Forecast]], settings: CompileSettings) -> None:
        self._planned, self._settings = planned, settings
        jobs = [job for plan, expected in planned for job in plan_jobs(plan, expected, settings)]
        self._total = len(jobs)
        self._results = {(job.recipe, job.spec.name): hit for job in jobs if (hit := cached(job))}
        missing = [job for job in jobs if (job.recipe, job.spec.name) not in self._results]
        self._missing = sorted(missing, key=lambda job: -job.seconds)
        memory_bytes = max((job.memory_bytes for job in missing), default=0)
        self.workers = settings.workers or worker_count(memory_bytes, max(len(missing), 1))
        self._tallies = {
            plan.recipe.name: _Tally({job.spec.name: job.seconds for job in self.missing(plan)}, self.workers)
            for plan, _ in planned
        }

    def missing(self, plan: Plan) -> list[Job]:
        """Return the jobs of a plan's graphs that the cache lacks."""
        return [job for job in self._missing if job.recipe == plan.recipe.name]

    def run(self, log: Log, progress: Progress, compile_jobs: CompileJobs | None = None) -> list[list[Compiled]]:
        """Compile what is missing, and return all graphs by plan; log each result and the remaining time.

        `compile_jobs` compiles elsewhere than in workers of this machine.

        Raises:
            HostError: the first failure, with the graph and its log. Graphs already compiled stay in the cache.

        """
        for plan, _ in self._planned:
            log(self._begun(plan))
        if self._missing:
            started = time.monotonic()
            progress("compile", len(self._results), self._total)
            (compile_jobs or compile_all)(self._missing, self.workers, partial(self._end, log, progress))
            hits = sum(result.hit for result in self._results.values())
            took = duration(time.monotonic() - started)
            log(f"compile: {len(self._results) - hits} graphs compiled, {hits} from the cache ({took})")
        return [[self._results[plan.recipe.name, spec.name] for spec in plan.graphs] for plan, _ in self._planned]

    def _begun(self, plan: Plan) -> str:
        prefix = f"{plan.recipe.name}: " if len(self._planned) > 1 else ""
        if not (missing := self.missing(plan)):
            return f"compile: {prefix}all {len(plan.graphs)} graphs are cached"
        total = len(plan.graphs)
        what = f"{total} graphs, {total - len(missing)} cached, {self.workers} at a time"
        return f"compile: {prefix}{what}; logs in {log_folder(plan, self._settings)}"

    def _end(self, log: Log, progress: Progress, result: Compiled) -> None:
        self._results[result.recipe, result.spec.name] = result
        tally = self._tallies[result.recipe]
        tally.end(result)
        progress("compile", len(self._results), self._total)
        prefix = f"{result.recipe}: " if len(self._planned) > 1 else ""
        log(f"  {prefix}{tally.line(result)}")
        for note in result.notes:
            log(f"    {note}")


def plan_jobs(plan: Plan, expected: Forecast, settings: CompileSettings) -> list[Job]:
    """Return a job for each graph of a plan."""
    name, backend, logs = plan.recipe.name, plan.recipe.backend, log_folder(plan, settings)
    return [
        Job(
            spec, plan.pair, backend, settings.cache, logs / f"{spec.name}.log", settings.remote, name,
            graph.seconds, graph.memory_bytes,
        )
        for spec in plan.graphs
        for graph in [expected.graphs[spec.name]]
    ]  # fmt: skip


def log_folder(plan: Plan, settings: CompileSettings) -> Path:
    """Return the folder of a plan's compile logs."""
    return settings.cache / "logs" / plan.recipe.name


class _Tally:
    """The graphs left to compile, with estimated times; times of finished graphs correct the other estimates."""

    def __init__(self, seconds: Mapping[str, float], workers: int) -> None:
        self.seconds_left, self.workers = dict(seconds), workers
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
        return f"{result.spec.name}: {how}{remaining}"


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
    return None if key is None else Compiled(job.spec, key, hit=True, seconds=0.0, recipe=job.recipe)


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
        with memos.lock(memo), nullcontext() if job.captured else output_to(job.log_file):
            key = _memoised_key(job, memo)  # another build may have compiled it while this one waited
            if key is None:
                key, hit = _trace_and_compile(job, backend, notes)
                memos.put(memo, key.encode())
    seconds, size_bytes = time.monotonic() - started, Cache(job.cache, "graphs").size_bytes(key)
    memory_bytes = 0 if hit else peak_bytes()
    return Compiled(job.spec, key, hit, seconds, tuple(notes), job.recipe, memory_bytes, size_bytes)


def _memoised_key(job: Job, memo: str) -> str | None:
    """Return the key in a memo if the cache has its graph, undamaged."""
    memo_file = Cache(job.cache, "memos").get(memo)
    if memo_file is None:
        return None
    key = memo_file.read_text(encoding="ascii")
    return key if Cache(job.cache, "graphs").get(key) is not None else None


def _trace_and_compile(job: Job, backend: Backend, notes: list[str]) -> tuple[str, bool]:
    """Look in the local, then in the shared cache; compile on a miss, and push the graph to the shared cache."""
    traced = backend.trace(job.spec, job.pair)
    key = cache_key(traced, backend.toolchain(), backend.flags())

    def compiled() -> bytes:
        with work_folder("compile") as work:
            objects = compiled_subgraphs(job, backend, traced, work, notes.append)
            return _compile(job, partial(backend.compile, traced, work, objects))

    found = SharedCache(job, "graphs", backend, notes.append).obtain(key, compiled)
    assert found is not None
    return key, found.hit


def compiled_subgraphs(job: Job, backend: Backend, traced: Traced, work: Path, log: Log = no_log) -> Path | None:
    """Return a folder with the object files of a graph's subgraphs, compiled on a miss; None for a graph without any.

    Subgraphs that other workers are compiling are left to the end.
    """
    if not traced.subgraphs:
        return None
    cache = SharedCache(job, "subgraphs", backend, log)
    folder = work / "subgraphs"
    folder.mkdir()
    waiting = list(traced.subgraphs)
    for is_last_pass in (False, True):
        for subgraph in tuple(waiting):
            key = cache_key(subgraph, backend.toolchain(), backend.flags())
            found = cache.obtain(key, partial(_compiled_subgraph, job, backend, subgraph), wait=is_last_pass)
            if found is not None:
                link_or_copy(found.file, folder / f"{subgraph.name}.o")
                waiting.remove(subgraph)
    return folder


def _compiled_subgraph(job: Job, backend: Backend, subgraph: TracedSubgraph) -> bytes:
    with work_folder("subgraph") as own:
        return _compile(job, partial(backend.compile_subgraph, subgraph, own))


@dataclass(frozen=True)
class Found:
    """Compiled code in the local cache. `hit`: not compiled just now."""

    file: Path
    hit: bool


class SharedCache(BackedCache):
    """Compiled code of one kind, which one of all machines compiles."""

    def __init__(self, job: Job, kind: Kind, backend: Backend, log: Log) -> None:
        remote = job.remote.open(kind, log) if job.remote else None
        super().__init__(Cache(job.cache, kind), remote, backend.toolchain().as_dict())
        self.log = log
        self._claims = remote if job.claim and remote and remote.mode == "write" else None

    def obtain(self, key: str, make: Callable[[], bytes], *, wait: bool = True) -> Found | None:
        """Return the code under `key`, made on a miss; without `wait`, None while another process makes it.

        Of all processes that share the local cache, and all machines that write the shared one, one makes it.
        """
        with self.local.lock(key, wait=wait) as locked:
            if not locked:
                return None
            if file := self.get(key):
                return Found(file, hit=True)
            with self._claimed(key, wait=wait) as is_mine:
                if not is_mine:
                    return None
                if self._claims and (file := self.get(key)):  # another machine has pushed it in the meantime
                    return Found(file, hit=True)
                return Found(self.put(key, make()), hit=False)

    def _claimed(self, key: str, *, wait: bool) -> AbstractContextManager[bool]:
        if self._claims is None:
            return nullcontext(enter_result=True)
        return claimed(self._claims.bucket, f"{self.local.kind}/{key}", wait=wait, log=self.log)


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


def remember(job: Job, backend: Backend, key: str) -> None:
    """Store the memo of a graph that another machine traced."""
    Cache(job.cache, "memos").put(_memo_key(job, backend), key.encode())


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
