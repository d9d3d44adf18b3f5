"""The contract of an executor, which decides where jobs run, independent of what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What an executor for several machines reads of a job: its name, its log here, and what it needs of a machine.

    `seconds` is an estimate. `custom` are resources that a cluster's nodes are started with, by name and amount.
    """

    name: str
    log_file: Path
    seconds: float = 0.0
    cores: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Runs jobs in other processes, on this machine or on others."""

    def run(self, work: Callable[[Job], Result], jobs: Sequence[Job], done: Callable[[Result], None]) -> list[Result]:
        """Return `work(job)` for each job, in the order of `jobs`; call `done` with each result when its job ends.

        `work` is a function of a module, jobs and results can be pickled, and `done` is called in the caller's thread.

        Raises:
            HostError: a worker was killed. An error of a job is raised as it is, and ends the other jobs.

        """
        ...
