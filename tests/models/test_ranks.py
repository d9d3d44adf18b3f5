"""Every family split over ranks by the sharder: the logits of two and four ranks are those of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.backends.neuron.module import NeuronSeams
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import run_phase
from pipeline.graphs.packing import BlockPacking, InOutPacking, Packing, PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.parallel import Seams
from pipeline.recipe import load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve_pair
from pipeline.stages.shard_files import shard_path, write_shards
from support import families

SPLIT = (
    "olmo3", "gemma3", "gemma4", "gemma4-experts", "gemma4-small", "glm4", "granite", "granite4", "smollm3",
    "phi4-mini", "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss", "llama4",
)  # fmt: skip
RECURRENT = ("qwen3-next", "qwen3.5")
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


class BlockedRank(RankSeams, BlockedSeams):
    """The same with blocked weights, as CPU graphs read them."""

    once = Seams.once


class InOutRank(RankSeams):
    """The same with the weights of Neuron graphs."""

    linear, last_outputs = NeuronSeams.linear, NeuronSeams.last_outputs
    inputs_first, tied_head = NeuronSeams.inputs_first, NeuronSeams.tied_head

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        return (x_BTI.float() @ weight.float())[..., :rows]


def logits_of(
    root: Path, models: ModelsSpec, tokens: Tensor, packing: Packing = PlainPacking(), seams: type = RankSeams,  # noqa: B008
    output: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The logits that each rank of a target computes, from its shard."""
    pair, meeting = PairSpec(models, rows=1, length=32), Meeting(models.tp)
    spec = replace(SPEC, tokens=tokens.shape[1])
    io = signature(spec, pair, packing)

    def run(rank: int) -> Tensor:
        shard = load_file(shard_path(root, "target", rank, models.tp))
        given = {f"target/{name}": tensor for name, tensor in shard.items()}
        given |= {one.name: torch.zeros(one.shape, dtype=torch_dtype(one.dtype)) for one in io.state}
        given |= {"tokens": tokens, "position": torch.zeros(1, dtype=torch.int32), "lengths": torch.tensor([24])}
        with torch.no_grad():
            return run_phase(spec, pair, given, lambda tp: seams(tp, rank, meeting))[output]

    with ThreadPoolExecutor(models.tp) as pool:
        return list(pool.map(run, range(models.tp)))


def resolved(spec: families.Family, root: Path) -> tuple[Checkpoint, Checkpoint]:
    """A pair of a family, written below a folder."""
    draft = families.write_pair(spec, root)
    (root / "pair.yaml").write_text(
        f"name: pair\ntarget: {{source: ./target, dtype: float32}}\ndraft: {draft}\n"
        "speculation: {draft_tokens: [2]}\nshapes: {batch: [1], prefill: [24], kv: [32]}\n"
    )
    return resolve_pair(load(root / "pair.yaml"), base=root, cache=root / "cache")


@pytest.mark.parametrize("family", [*SPLIT, *RECURRENT])
def test_logits_of_ranks_are_those_of_one(family: str, tmp_path: Path) -> None:
    """More ranks than KV heads too: queries of one key head on two ranks, and both normalised as vectors."""
    spec = families.FAMILIES[family]
    enough = {"linear_num_key_heads": 4, "linear_num_value_heads": 8} if family in RECURRENT else {}
    target, drafted = resolved(replace(spec, changes=spec.changes | enough), tmp_path)
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


MIXTURES = {
    "gpt-oss": {"num_local_experts": 8},
    "gemma4-experts": {"num_experts": 8},
    "llama4": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 8},
    "qwen2-moe": {"num_experts": 8},
    "qwen3-moe": {"num_experts": 8},
}
LAYOUTS = {
    "plain": (PlainPacking(), RankSeams), "block": (BlockPacking(), BlockedRank), "in-out": (InOutPacking(), InOutRank),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MIXTURES)
def test_whole_experts_on_ranks_give_the_logits_of_one(family: str, layout: str, tmp_path: Path) -> None:
    """Expert parallelism, of few tokens and of many; a rank's shard has its own experts, all of their inner size."""
    spec, (packing, seams) = families.FAMILIES[family], LAYOUTS[layout]
    target, drafted = resolved(replace(spec, changes=spec.changes | MIXTURES[family]), tmp_path)
    apart = target.config.with_experts_by_rank
    whole = ModelsSpec(apart, drafted.config, "float32", "float32", 1, draft_replicated=True)
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    found: dict[int, list[Tensor]] = {}
    for tp in (1, 2, 4):
        models, out = replace(whole, tp=tp), tmp_path / f"{tp} ranks"
        write_shards(models, target, drafted, out, packing=packing)
        for few in (tokens, tokens[:, :1]):
            found.setdefault(few.shape[1], []).extend(logits_of(out, models, few, packing, seams))
        held = [load_file(shard_path(out, "target", rank, tp)) for rank in range(tp)]
        for name, first in held[0].items():
            if ".experts." in name and not name.endswith("down_proj.bias"):
                assert [len(one[name]) for one in held] == [8 // tp] * tp
                inner = next(kind.experts.intermediate for kind in apart.kinds if kind.experts)
                assert first[0].numel() >= inner
    for of_ranks in found.values():
        for logits in of_ranks[1:]:
            torch.testing.assert_close(logits, of_ranks[0], atol=2e-4, rtol=1e-4)


def test_experts_of_another_rank_are_not_read(tmp_path: Path) -> None:
    """Matrices of experts that no token chose on their rank may hold anything."""
    spec = families.FAMILIES["qwen3-moe"]
    target, drafted = resolved(replace(spec, changes=spec.changes | MIXTURES["qwen3-moe"]), tmp_path)
    models = ModelsSpec(target.config.with_experts_by_rank, drafted.config, "float32", "float32", 2, True)
    write_shards(models, target, drafted, tmp_path / "out", packing=BlockPacking())
    tokens = torch.tensor([[7]], dtype=torch.int32)
    wanted = logits_of(tmp_path / "out", models, tokens, BlockPacking(), BlockedRank)
    layers = [str(layer) for layer in range(models.target.layers) if models.target.layer(layer).experts]
    experts_LC = logits_of(tmp_path / "out", models, tokens, BlockPacking(), BlockedRank, output=1)[0][0, 0]
    chosen = dict(zip(layers, experts_LC.tolist(), strict=True))
    for rank in range(2):
        path = shard_path(tmp_path / "out", "target", rank, 2)
        shard = load_file(path)
        for name, tensor in shard.items():
            if ".experts." in name:
                unread = [e for e in range(4) if 4 * rank + e not in chosen[name.split(".")[2]]]
                assert unread
                tensor[unread] = torch.nan
        save_file(shard, path)
    found = logits_of(tmp_path / "out", models, tokens, BlockPacking(), BlockedRank)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
