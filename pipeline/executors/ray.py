"""Run jobs on the nodes of a Ray cluster: each as a Ray task with the resources that it needs.

This package's code goes to the nodes with the connection; its dependencies have to be installed there. Ray queues the
tasks. A task whose worker or node dies is run again elsewhere; an error that a job raises is not retried. All output
of the tasks arrives in the log files of this machine while they run. Moves no files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

from pipeline.errors import HostError, TandemError, reason
from pipeline.executors.base import Job, Result, Task
from pipeline.executors.output import output_sent
from pipeline.executors.scheduling import is_slow, longest_first, missing
from pipeline.progress import Log, duration, no_log

ATTEMPTS = 3
"""Runs of one job whose worker or node died."""
POLL_S = 0.5
CONNECT_S = 10.0
LATE_S = 10.0
"""Wait for output of a run that has ended."""
HEAD = {"node:__internal_head__": 0.001}
"""Resource of the head node, without which no cluster works."""
NODE = "ray.io/node-id"
"""Label of a node that Ray sets."""


@dataclass(frozen=True)
class Started:
    """A run has started on a node."""

    attempt: int
    node: str
    host: str


@dataclass(frozen=True)
class Output:
    """Output of a run."""

    attempt: int
    data: bytes


@dataclass(frozen=True)
class Ended(Generic[Result]):
    """The result of a run, or its error; `events` is the number of those that the run wrote to the board."""

    result: Result
    error: Exception | None
    events: int


class Board:
    """An actor on the head node: runs write what happens, the driver reads it."""

    def __init__(self) -> None:
        self.events: list[Started | Output] = []

    def write(self, event: Started | Output) -> None:
        """Add an event."""
        self.events.append(event)

    def take(self) -> list[Started | Output]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken


@dataclass
class Attempt:
    """One run of a job. `began`: monotonic seconds when the driver read that the run had started."""

    index: int
    ref: Any
    node: str = ""
    host: str = "a node"
    began: float | None = None
    events: int = 0


@dataclass(frozen=True)
class RayExecutor:
    """Runs jobs on a connected cluster (`connected`). `describe` returns what the executor reads of a job.

    `second` changes a job for a run beside a slow one, for example so that it does not wait for the slow one. `watch`
    is called about twice a second while jobs run: an error that it raises ends them.
    """

    describe: Callable[[Any], Task]
    log: Log = no_log
    second: Callable[[Any], Any] = field(default=lambda job: job)
    watch: Callable[[], None] = field(default=lambda: None)

    @property
    def cores(self) -> int:
        """Cores of the nodes that are up."""
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(self, work: Callable[[Job], Result], jobs: Sequence[Job], done: Callable[[Result], None]) -> list[Result]:
        """Return the results in the order of `jobs`, which start with the longest; see `Executor`.

        Raises:
            HostError: a job's workers or nodes died `ATTEMPTS` times, or the cluster was lost.

        """
        return _Run(self, work, jobs).results(done)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster: `ray://HOST:PORT`, or with None the one of RAY_ADDRESS or of this machine.

    Raises:
        HostError: no cluster answers, its version differs, or this process is connected already.

    """
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if ray.is_initialized():
        raise HostError("this process is connected to Ray already", where="ray", fix="call `ray.shutdown()` first")
    package = {"py_modules": [str(Path(__file__).parents[1])]}
    try:
        _reach(where)
        ray.init(address=where, runtime_env=package, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, exceptions.RayError) as error:
        start = "start a cluster (`ray start --head`) with this version of Ray and Python, or correct the address"
        own = f"Ray {ray.__version__}, Python {platform.python_version()}"
        raise HostError(f"no usable cluster for {own}: {_ends(error)}", where=where, fix=start) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ends(error: Exception) -> str:
    """Return the first and the last line of a message; Ray's have the cause at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [reason(error)]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def _reach(address: str) -> None:
    """Connect to the port of an address for a moment: Ray itself tries for minutes.

    Raises:
        OSError: nothing answers.

    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


class _Run(Generic[Job, Result]):
    """The state of one call of `RayExecutor.run`, in the driver."""

    def __init__(self, executor: RayExecutor, work: Callable[[Job], Result], jobs: Sequence[Job]) -> None:
        self.executor, self.work, self.jobs = executor, work, jobs
        self.tasks = [executor.describe(job) for job in jobs]
        self.ended: dict[int, Result] = {}
        self.attempts: list[Attempt] = []
        self.running: dict[Any, Attempt] = {}
        self.slower: list[float] = []  # times of ended jobs, each divided by its estimate
        self.board = ray.remote(Board).options(num_cpus=0, resources=HEAD).remote()
        self.remote = ray.remote(_perform)

    def results(self, done: Callable[[Result], None]) -> list[Result]:
        self._warn_of_missing_resources()
        try:
            self._read_board()  # waits until the board has started: the events of a run that dies early would be lost
            for index in longest_first(self.tasks):
                self._start(index, self.jobs[index])
            while len(self.ended) < len(self.jobs):
                self._step(done)
        except exceptions.RayActorError as error:
            fix = "run the same command again: what is finished is kept"
            raise HostError(f"the cluster's head node was lost: {reason(error)}", where="ray", fix=fix) from error
        finally:
            for ref in self.running:
                ray.cancel(ref, force=True)
            ray.kill(self.board)
        return [self.ended[index] for index in range(len(self.jobs))]

    def _step(self, done: Callable[[Result], None]) -> None:
        """Wait a moment for runs to end; read the board; take the results of the runs that ended."""
        ready, _ = ray.wait([*self.running], timeout=POLL_S)
        self.executor.watch()
        self._read_board()
        for ref in ready:
            attempt = self.running.pop(ref)
            if attempt.index not in self.ended and (ended := self._outcome(attempt)) is not None:
                self.ended[attempt.index] = ended.result
                self._cancel_others(attempt)
                done(ended.result)
        self._run_slow_ones_again()

    def _outcome(self, attempt: Attempt) -> Ended[Result] | None:
        """Return what a run ended with; None if its worker or node died and the job is run again."""
        try:
            ended: Ended[Result] = ray.get(attempt.ref)
        except exceptions.RayTaskError as error:  # not of the job: it could not be read on the node
            raise error.cause from error
        except exceptions.RuntimeEnvSetupError as error:
            what = f"the code of Tandem could not be set up on a node: {reason(error)}"
            raise HostError(
                what, where="ray", fix="see the logs of the runtime environment agent on the node"
            ) from error
        except exceptions.RayError as error:
            self._lost(attempt, error)
            return None
        deadline = time.monotonic() + LATE_S
        while attempt.events < ended.events and time.monotonic() < deadline:
            self._read_board()
        if ended.error is not None:
            raise ended.error
        task = self.tasks[attempt.index]
        if attempt.began is not None and task.seconds:
            self.slower.append((time.monotonic() - attempt.began) / task.seconds)
        return ended

    def _lost(self, attempt: Attempt, error: exceptions.RayError) -> None:
        """Run a job again whose worker or node died, unless a second run of it is under way.

        Raises:
            HostError: it died `ATTEMPTS` times.

        """
        task = self.tasks[attempt.index]
        what = f"{task.name}: lost on {attempt.host}: {_cause(error)}"
        if self._others(attempt):
            self.executor.log(f"  {what}")
            return
        count = sum(other.index == attempt.index for other in self.attempts)
        if count >= ATTEMPTS:
            fix = f"give the nodes more memory (the estimate is {task.memory_bytes >> 20} MiB), and see {task.log_file}"
            raise HostError(f"{what}, {count} times", where="ray", fix=fix) from error
        self.executor.log(f"  {what}; run again")
        self._start(attempt.index, self.jobs[attempt.index], avoid=attempt.node)

    def _start(self, index: int, job: Job, avoid: str = "") -> None:
        task, number = self.tasks[index], len(self.attempts)
        elsewhere = NodeLabelSchedulingStrategy(hard={}, soft={NODE: NotIn(avoid)}) if avoid else None
        options = {
            "num_cpus": task.cores, "num_gpus": task.gpus, "memory": task.memory_bytes or None,
            "resources": dict(task.custom), "max_retries": 0, "name": task.name, "scheduling_strategy": elsewhere,
        }  # fmt: skip
        ref = self.remote.options(**options).remote(self.work, job, number, self.board)
        attempt = Attempt(index, ref)
        self.attempts.append(attempt)
        self.running[ref] = attempt

    def _read_board(self) -> None:
        for event in ray.get(self.board.take.remote()):
            self._note(event)

    def _note(self, event: Started | Output) -> None:
        """Log where a run started, or append its output to the log of its job."""
        attempt = self.attempts[event.attempt]
        attempt.events += 1
        task = self.tasks[attempt.index]
        if isinstance(event, Started):
            attempt.node, attempt.host, attempt.began = event.node, event.host, time.monotonic()
            self.executor.log(f"  {task.name}: started on {event.host}")
            return
        task.log_file.parent.mkdir(parents=True, exist_ok=True)
        with task.log_file.open("ab") as file:
            file.write(event.data)

    def _run_slow_ones_again(self) -> None:
        """Start a second run, on another node, of each job that is slow while no job waits for a node."""
        if any(attempt.began is None for attempt in self.running.values()):
            return
        for attempt in [*self.running.values()]:
            task, elapsed_s = self.tasks[attempt.index], time.monotonic() - (attempt.began or 0.0)
            if is_slow(elapsed_s, task.seconds, self.slower) and not self._others(attempt):
                self.executor.log(
                    f"  {task.name}: slow on {attempt.host} ({duration(elapsed_s)}); second run elsewhere"
                )
                self._start(attempt.index, self.executor.second(self.jobs[attempt.index]), avoid=attempt.node)

    def _others(self, attempt: Attempt) -> list[Attempt]:
        return [other for other in self.running.values() if other.index == attempt.index and other is not attempt]

    def _cancel_others(self, attempt: Attempt) -> None:
        for other in self._others(attempt):
            ray.cancel(other.ref, force=True)

    def _warn_of_missing_resources(self) -> None:
        """Log which jobs no node that is up can run; a cluster that scales itself may start one."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for task in self.tasks:
            needs = {"CPU": task.cores, "GPU": task.gpus, "memory": float(task.memory_bytes), **task.custom}
            if lacking := missing(needs, nodes):
                self.executor.log(f"warning: no node that is up has {lacking}; {task.name} waits for such a node")
                return


def _cause(error: exceptions.RayError) -> str:
    if isinstance(error, exceptions.OutOfMemoryError):
        return "the node ran out of memory"
    return "its node died" if isinstance(error, exceptions.NodeDiedError) else "its worker or node died"


def _perform(work: Callable[[Job], Result], job: Job, attempt: int, board: Any) -> Ended[Any]:
    """In a worker of a node: run a job, with its output sent to the board.

    No answer of the board is awaited: Ray gives the cores of a task that waits to another task.
    """
    context, written = ray.get_runtime_context(), 0

    def write(event: Started | Output) -> None:
        nonlocal written
        written += 1
        board.write.remote(event)

    result, error = None, None
    write(Started(attempt, context.get_node_id(), platform.node()))
    with output_sent(lambda data: write(Output(attempt, data))):
        try:
            result = work(job)
        except Exception as raised:
            if not isinstance(raised, TandemError):
                traceback.print_exc()
            error = _sendable(raised)
    return Ended(result, error, written)


def _sendable(error: Exception) -> Exception:
    """Return an error, or its text if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error
