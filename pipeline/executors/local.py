"""Run jobs in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
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
    with ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_share, initargs=(workers,)) as pool:
        futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
        results: dict[int, Result] = {}
        try:
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
            raise
    return [results[index] for index in range(len(jobs))]


def _share(workers: int) -> None:
    """Split the cores among the workers, before torch is imported."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
