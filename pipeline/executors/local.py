"""Run jobs in worker processes on this machine.

A server process imports a backend's libraries once, and every worker is a fork of it: an import of torch and its
compiler takes several seconds and about 300 MB, which the workers then share.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pipeline.errors import HostError
from pipeline.executors.base import Job, Result
from pipeline.files.temporary import start_server


@dataclass(frozen=True)
class LocalExecutor:
    """Runs at most `workers` jobs at a time, each in a worker process that splits the cores with the others.

    `preload` are modules that workers share; they start no thread when they are imported, which a fork would lose.
    """

    workers: int
    preload: tuple[str, ...] = ()

    def run(self, work: Callable[[Job], Result], jobs: Sequence[Job], done: Callable[[Result], None]) -> list[Result]:
        """Return the results in the order of `jobs`; `done` is called when each job ends.

        Raises:
            HostError: a worker was killed, most often for lack of memory. An error of a job is raised as it is; jobs
                that have not started are cancelled.

        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        start_server()
        arguments = self.workers, dict(os.environ)
        with ProcessPoolExecutor(self.workers, context, initializer=_start, initargs=arguments) as pool:
            results: dict[int, Result] = {}
            futures: dict[Future[Result], int] = {}
            try:
                futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    done(results[futures[future]])
            except BrokenProcessPool as error:
                raise HostError(
                    "a compile worker was killed, probably for lack of memory",
                    where="compile",
                    fix="free memory or lower --workers, then run the same command: finished graphs are kept",
                ) from error
            except BaseException:
                for future in futures:
                    future.cancel()
                for worker in multiprocessing.active_children():
                    worker.kill()  # otherwise leaving the pool waits for running compiles, which may take minutes
                raise  # leaving the pool waits for its thread: one that ends with the process fails now and then
        return [results[index] for index in range(len(jobs))]


def _start(workers: int, environ: Mapping[str, str]) -> None:
    """Start a worker: take the parent's environment, split the cores, ignore Ctrl-C, and end when the parent ends."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.clear()  # the server's environment is that of its start
    os.environ.update(environ, OMP_NUM_THREADS=str(threads))
    if torch := sys.modules.get("torch"):  # preloaded: it has read the variable already
        torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Kill this worker when its parent has ended: otherwise it would keep its locks and wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
