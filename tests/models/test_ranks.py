"""Every family split over ranks by the sharder: the logits of two and four ranks are those of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.graphs.module import run_phase
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.parallel import Seams
from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from pipeline.stages.shard_files import shard_path, write_shards
from support import families

SPLIT = (
    "olmo3",
    "gemma3",
    "gemma4",
    "glm4",
    "granite",
    "granite4",
    "smollm3",
    "phi4-mini",
    "qwen3-moe",
    "qwen2-moe",
    "mixtral",
    "gpt-oss",
)
SPEC = GraphSpec("score", 1, 24, 32, model="target")


class Meeting:
    """Where ranks, each a thread, exchange tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def all(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks."""
        self.given[rank] = tensor
        self.barrier.wait(timeout=60)
        tensors = list(self.given)
        self.barrier.wait(timeout=60)
        return tensors


class RankSeams(Seams):
    """One of several ranks in this process."""

    def __init__(self, tp: int, rank: int, meeting: Meeting) -> None:
        self.tp, self.rank, self.meeting = tp, rank, meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.tp == 1 else torch.stack(self.meeting.all(self.rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return x if self.tp == 1 else torch.cat(self.meeting.all(self.rank, x), dim=-1)


def logits_of(root: Path, models: ModelsSpec, tokens: Tensor) -> list[Tensor]:
    """The logits that each rank of a target computes, from its shard."""
    pair, meeting = PairSpec(models, rows=1, length=32), Meeting(models.tp)
    io = signature(SPEC, pair, PlainPacking())

    def run(rank: int) -> Tensor:
        shard = load_file(shard_path(root, "target", rank, models.tp))
        given = {f"target/{name}": tensor for name, tensor in shard.items()}
        given |= {one.name: torch.zeros(one.shape) for one in io.state}
        given |= {"tokens": tokens, "position": torch.zeros(1, dtype=torch.int32)}
        with torch.no_grad():
            return run_phase(SPEC, pair, given, lambda tp: RankSeams(tp, rank, meeting))[0]

    with ThreadPoolExecutor(models.tp) as pool:
        return list(pool.map(run, range(models.tp)))


@pytest.mark.parametrize("family", SPLIT)
def test_logits_of_ranks_are_those_of_one(family: str, tmp_path: Path) -> None:
    """More ranks than KV heads too: queries of one key head on two ranks, and both normalised as vectors."""
    draft = families.write_pair(families.FAMILIES[family], tmp_path)
    (tmp_path / "pair.yaml").write_text(
        f"name: pair\ntarget: {{source: ./target, dtype: float32}}\ndraft: {draft}\n"
        "speculation: {draft_tokens: [2]}\nshapes: {batch: [1], prefill: [24], kv: [32]}\n"
    )
    target, drafted = resolve_pair(load(tmp_path / "pair.yaml"), base=tmp_path, cache=tmp_path / "cache")
    whole = ModelsSpec(target.config, drafted.config, "float32", "float32", 1, draft_replicated=True)
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    found = {}
    for tp in (1, 2, 4):
        models, out = replace(whole, tp=tp), tmp_path / f"{tp} ranks"
        write_shards(models, target, drafted, out, packing=PlainPacking())
        found[tp] = logits_of(out, models, tokens)
    for tp in (2, 4):
        for logits in found[tp]:
            torch.testing.assert_close(logits, found[1][0], atol=2e-4, rtol=1e-4)
