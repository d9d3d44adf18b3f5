"""Run jobs in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.errors import HostError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, done: Callable[[Result], None]
) -> list[Result]:
    """Results in the order of `jobs`; `done` is called as each ends.

    Raises:
        HostError: a worker died (most often: killed for memory). Errors of a job are raised as they are; jobs not yet
            started are cancelled.

    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(workers,)) as pool:
        results: dict[int, Result] = {}
        try:
            futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done(results[futures[future]])
        except BrokenProcessPool as error:
            raise HostError(
                "a compile worker was killed; the machine is probably out of memory",
                where="compile",
                fix="free memory or lower --workers, then run the same command: finished graphs are kept",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # leaving would wait for what they compile now, which may take minutes
            raise
    return [results[index] for index in range(len(jobs))]


def _start(workers: int) -> None:
    """Begin a worker: split the cores, before torch is imported; leave Ctrl-C to the parent, and end when it ends."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; they would hold locks, and wait for work, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
