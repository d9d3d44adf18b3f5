"""All ranks of an artifact behind one call. One rank runs here; more run in processes joined by gloo."""

from __future__ import annotations

import multiprocessing
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.artifact import Manifest
from pipeline.errors import HostError
from pipeline.plan import GraphSpec
from pipeline.runtime.session import Session


class Ranks(Protocol):
    """Runs a graph on every rank; rank 0's outputs are the answer."""

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph."""
        ...

    def reset(self) -> None:
        """Zero all state."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Rank 0's live state by name."""
        ...

    def close(self) -> None:
        """End workers."""
        ...


def open_ranks(root: Path, manifest: Manifest) -> Ranks:
    """Ranks of an artifact that has been verified."""
    if manifest.tensor == 1:
        return OneRank(root, manifest)
    return ManyRanks(root, manifest)


class OneRank:
    """A single rank in this process."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.session = Session(root, manifest)

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph."""
        return self.session.run(spec, arguments)

    def reset(self) -> None:
        """Zero all state."""
        self.session.reset()

    def state(self) -> dict[str, Tensor]:
        """Rank 0's live state by name."""
        return self.session.state()

    def close(self) -> None:
        """Nothing to end."""


class ManyRanks:
    """Rank 0 here, the others in worker processes; all run the same graph on the same arguments."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self._workers = []
        for rank in range(1, manifest.tensor):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, root, manifest, rank, port), daemon=True)
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)
        _join(0, manifest.tensor, port)
        self.session = Session(root, manifest, 0)

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph on every rank."""
        plain = {
            name: (tensor.tolist(), str(tensor.dtype).removeprefix("torch.")) for name, tensor in arguments.items()
        }
        for pipe in self._pipes:
            pipe.send((spec, plain))
        outputs = self.session.run(spec, arguments)
        for rank, pipe in enumerate(self._pipes, start=1):
            failure = pipe.recv()
            if failure is not None:
                raise HostError(failure, where=f"rank {rank}", fix="run `tandem verify` on the artifact")
        return outputs

    def reset(self) -> None:
        """Zero all state on every rank."""
        for pipe in self._pipes:
            pipe.send(None)
            pipe.recv()
        self.session.reset()

    def state(self) -> dict[str, Tensor]:
        """Rank 0's live state by name."""
        return self.session.state()

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(timeout=10)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _serve(pipe: Connection, root: Path, manifest: Manifest, rank: int, port: int) -> None:
    """Worker: run what rank 0 sends until it closes the pipe."""
    torch.set_num_threads(1)
    _join(rank, manifest.tensor, port)
    session = Session(root, manifest, rank)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            break
        if message is None:
            session.reset()
            pipe.send(None)
            continue
        spec, plain = message
        try:
            session.run(spec, {k: torch.tensor(v, dtype=getattr(torch, dtype)) for k, (v, dtype) in plain.items()})
            pipe.send(None)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


def _join(rank: int, ranks: int, port: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
