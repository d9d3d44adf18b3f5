"""All ranks of an artifact behind one call: one rank in this process, or a process per rank, connected by gloo.

A server process imports torch once, and every rank is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.inductor.session import Session
from pipeline.errors import HostError, InputError, reason
from pipeline.files.temporary import start_server
from pipeline.files.unfinished import work_folder
from pipeline.graphs.spec import GraphSpec

COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""Time limit of a rank's wait for another rank in a collective."""

TIMEOUT_VARIABLE = "TANDEM_RANK_TIMEOUT_S"
"""Environment variable: seconds within which every rank must have run a graph."""
TIMEOUT_S = 600.0
"""Longer than a collective's limit, which names the rank that waits; the first run of a graph also opens it."""


@dataclass(frozen=True)
class RowCopy:
    """Copy the first `tokens` positions of one row's caches to another."""

    source: int
    target: int
    tokens: int


Message = tuple[GraphSpec, dict[str, np.ndarray]] | RowCopy | None
"""A graph to run with its arguments, or caches to copy; None to zero the state."""


@dataclass(frozen=True)
class Place:
    """One rank of an artifact: where its process finds the artifact, the other ranks and its environment."""

    root: Path
    manifest: PairManifest
    rank: int
    folder: str
    """Where the ranks meet."""
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    """The server's environment is that of its start."""


class OneRank:
    """A single rank in this process."""

    def __init__(self, root: Path, manifest: PairManifest) -> None:
        self.session = Session(root, manifest)

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph."""
        return self.session.run(spec, arguments)

    def reset(self) -> None:
        """Zero all state."""
        self.session.reset()

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first positions of a row's caches to another row."""
        self.session.copy_row(source, target, tokens)

    def state(self) -> dict[str, Tensor]:
        """Return the live state by name."""
        return self.session.state()

    def close(self) -> None:
        """Do nothing: there is no worker."""


class ManyRanks:
    """Every rank in a worker process; all run the same graph on the same arguments.

    This process runs no rank, so that a killed rank ends the call with an error instead of a hang.
    """

    def __init__(self, root: Path, manifest: PairManifest) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        start_server()
        self._cleanup = ExitStack()
        folder = self._cleanup.enter_context(work_folder("ranks"))
        self._pipes: list[Connection] = []
        self._timeout_s = _timeout_s()
        self._workers: list[ForkServerProcess] = []
        for rank in range(manifest.ranks):
            ours, theirs = context.Pipe()
            place = Place(root, manifest, rank, str(folder))
            worker = context.Process(target=_serve, args=(theirs, place), daemon=True, name=f"rank {rank}")
            worker.start()
            theirs.close()
            self._pipes.append(ours)
            self._workers.append(worker)
        with self._end_on_failure():
            self._answers(None)  # the weights of a large model take long to read

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph on every rank.

        Raises:
            HostError: a rank failed or was killed, in this or an earlier call; the other ranks are ended as well.

        """
        return _tensors(self._ask((spec, _arrays(arguments))))

    def reset(self) -> None:
        """Zero all state on every rank."""
        self._ask(None)

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first positions of a row's caches to another row, on every rank."""
        self._ask(RowCopy(source, target, tokens))

    def state(self) -> dict[str, Tensor]:
        """Return an empty dict: each rank's state is in its own process."""
        return {}

    def close(self) -> None:
        """End the workers."""
        pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(timeout=10)
            worker.kill()
        self._cleanup.close()

    def _ask(self, message: Message) -> dict[str, np.ndarray]:
        if not self._pipes:
            raise HostError("the rank processes have ended", where="ranks", fix="load the artifact again")
        with self._end_on_failure():
            for pipe in self._pipes:
                with suppress(BrokenPipeError):  # `_answers` names the rank that ended
                    pipe.send(message)
            return self._answers(self._timeout_s)

    @contextmanager
    def _end_on_failure(self) -> Iterator[None]:
        """End the ranks unless all of them answer: the next call would take late answers for its own."""
        try:
            yield
        except BaseException:  # a timeout or Ctrl-C too
            for worker in self._workers:
                worker.kill()
            self.close()
            raise

    def _answers(self, timeout_s: float | None) -> dict[str, np.ndarray]:
        """Wait for an answer of each rank; return rank 0's.

        Raises:
            HostError: a rank failed, ended, or did not answer in time.

        """
        answers: dict[int, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(answers) < len(self._pipes):
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._ready(answers, left_s)
            if not ready:
                late = ", ".join(str(rank) for rank in range(len(self._pipes)) if rank not in answers)
                what, fix = f"no answer within {timeout_s:g} s", f"load the artifact again; limit: {TIMEOUT_VARIABLE}"
                raise HostError(what, where=f"rank {late}", fix=fix)
            for rank in ready:
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionError):
                    answers[rank] = f"the process of the rank ended with exit code {self._exit_code(rank)}"
                if isinstance(answers[rank], str):
                    fix = "free memory, check the files with `tandem verify ARTIFACT`, then load the artifact again"
                    raise HostError(answers[rank], where=f"rank {rank}", fix=fix)
        outputs: dict[str, np.ndarray] = answers[0]
        return outputs

    def _ready(self, answered: dict[int, Any], timeout_s: float | None) -> list[int]:
        """Return ranks whose pipe has an answer or is closed; none after the timeout."""
        ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answered], timeout_s)
        return [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]

    def _exit_code(self, rank: int) -> int | None:
        self._workers[rank].join(timeout=10)
        return self._workers[rank].exitcode


def _timeout_s() -> float:
    """Return the time limit of a graph's run on all ranks, in seconds.

    Raises:
        InputError: the variable is no positive number.

    """
    text = os.environ.get(TIMEOUT_VARIABLE) or str(TIMEOUT_S)
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise InputError(f"found {text!r}, expected seconds", where=TIMEOUT_VARIABLE, fix=f"unset {TIMEOUT_VARIABLE}")


def _serve(pipe: Connection, place: Place) -> None:
    """Run a worker: join the other ranks, load, then answer messages with outputs or a failure until it closes."""
    try:
        os.environ.clear()
        os.environ.update(place.environ)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.manifest.ranks))
        if place.manifest.requires.get("device") == "cuda":
            torch.cuda.set_device(place.rank)
        _join(place)
        session = Session(place.root, place.manifest, place.rank)
        pipe.send({})
        while True:
            pipe.send(_answer(session, pipe.recv(), place.rank))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except Exception as error:
        with suppress(BrokenPipeError):
            pipe.send(reason(error))


def _answer(session: Session, message: Message, rank: int) -> dict[str, np.ndarray]:
    if message is None:
        session.reset()
        return {}
    if isinstance(message, RowCopy):
        session.copy_row(message.source, message.target, message.tokens)
        return {}
    spec, arguments = message
    outputs = session.run(spec, _tensors(arguments))
    return _arrays(outputs) if rank == 0 else {}


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Convert to plain arrays, which a pipe sends without torch's shared memory."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _join(place: Place) -> None:
    """Join the other ranks through a file, over the loopback interface: needs no free port and no host name."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = place.manifest.ranks
    store = FileStore(f"{place.folder}/meet", ranks)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=place.rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )
