"""Ranks that run graphs eagerly as an artifact does: from shards in blocks, each rank a thread, with its seams.

Only kernels are left out: operators run as their definitions in Python. Faults in packing, in the cuts for ranks and in
the seams can be planted.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.backends.inductor import seams
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import run_phase
from pipeline.graphs.packing import BlockPacking
from pipeline.graphs.signature import Signature, signature
from pipeline.graphs.spec import ROLES, GraphSpec
from pipeline.models.parallel import Seams
from pipeline.plan.plan import Plan
from pipeline.sources.checkpoint import Checkpoint
from pipeline.stages.shard_files import shard_path, write_shards
from support.eager import checked

WAIT_S = 60


class Meeting:
    """Where ranks, each a thread, exchange tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks), [torch.empty(0)] * ranks
        self.here = threading.local()

    def all(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks."""
        self.given[self.here.rank] = tensor
        self.barrier.wait(timeout=WAIT_S)
        tensors = list(self.given)
        self.barrier.wait(timeout=WAIT_S)
        return tensors

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Exchange here what ranks exchange by torch.distributed."""
        stacked = {
            "all_reduce": lambda x: torch.stack(self.all(x)).sum(0).to(x.dtype),
            "all_gather": lambda x, ranks: torch.stack(self.all(x)),
        }
        with patch.multiple(seams, **stacked):
            yield


class SplitRanks:
    """The ranks of a plan, as `support.eager.EagerRanks`."""

    def __init__(self, plan: Plan, pair: tuple[Checkpoint, Checkpoint]) -> None:
        self.shape, self.tp, self.packing = plan.pair, plan.pair.models.tp, BlockPacking()
        with tempfile.TemporaryDirectory() as folder:
            write_shards(plan.pair.models, *pair, Path(folder), packing=self.packing)
            self.weights = [
                {
                    f"{role}/{name}": tensor
                    for role in ROLES
                    for name, tensor in load_file(shard_path(Path(folder), role, rank, self.tp)).items()
                }
                for rank in range(self.tp)
            ]
        self.states: list[dict[str, Tensor]] = [{} for _ in range(self.tp)]
        self.signatures: dict[GraphSpec, Signature] = {}

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        if spec not in self.signatures:
            self.signatures[spec] = signature(spec, self.shape, self.packing)
        io = self.signatures[spec]
        given = checked(io, arguments)
        meeting = Meeting(self.tp)

        def run(rank: int) -> tuple[Tensor, ...]:
            meeting.here.rank = rank
            for t in io.state:
                self.states[rank].setdefault(t.name, torch.zeros(t.shape, dtype=torch_dtype(t.dtype)))
            try:
                with torch.no_grad():
                    return run_phase(spec, self.shape, {**self.weights[rank], **self.states[rank], **given}, _seams)
            except BaseException:
                meeting.barrier.abort()
                raise

        if self.tp == 1:
            outputs = run(0)
        else:
            with meeting.collectives(), ThreadPoolExecutor(self.tp) as pool:
                outputs, *_ = [rank.result() for rank in [pool.submit(run, rank) for rank in range(self.tp)]]
        return {t.name: out for t, out in zip(io.outputs, outputs, strict=True)}

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        for tensor in (tensor for state in self.states for tensor in state.values() if tensor.dim() == 4):
            tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def reset(self) -> None:
        for tensor in (tensor for state in self.states for tensor in state.values()):
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the caches of a single rank; ranks share the heads, so there are none to compare."""
        return self.states[0] if self.tp == 1 else {}

    def close(self) -> None:
        pass


def _seams(tp: int) -> Seams:
    return seams.BlockedSeams() if tp == 1 else seams.RankedSeams(tp)
