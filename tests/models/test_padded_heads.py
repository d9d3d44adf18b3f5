"""Query heads that do not fill the ranks of their KV head: zeros take the rest, as NxD Inference pads them."""

from dataclasses import replace

import pytest
import torch

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import attention
from pipeline.models.families import config_of
from pipeline.models.parallel import Pass, Seams, attend_up_to, plan_writes
from pipeline.models.rank_slices import kv_head_of, local_heads, q_heads_of
from pipeline.models.rotary import rotary_of
from support.pairs import SMALL
from support.shards import expected_slice

LLAMA_1B = replace(config_of(SMALL, "1B"), heads=32, kv_heads=8, head_dim=64)


class Ranked(Seams):
    """One of several ranks, whose sum the test computes."""

    def __init__(self, tp: int) -> None:
        self.tp = tp


@pytest.mark.parametrize(
    ("config", "tp", "share"),
    [(LLAMA_1B, 64, 1), (LLAMA_1B, 32, 1), (LLAMA_1B, 8, 4), (replace(LLAMA_1B, heads=40), 16, 3)],
)
def test_every_head_is_on_one_rank_with_its_kv_head(config: ModelConfig, tp: int, share: int):
    assert local_heads(config, tp) == share
    found = []
    for rank in range(tp):
        first, last = q_heads_of(rank, config, tp)
        assert last - first <= share
        found += range(first, last)
        kv_first, kv_last = kv_head_of(rank, config, tp)
        assert {head // (config.heads // config.kv_heads) for head in range(first, last)} <= set(
            range(kv_first, kv_last)
        )
    assert found == list(range(config.heads))


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("heads", [2, 4, 6])
def test_attention_of_all_ranks_adds_up_to_that_of_one(tp: int, heads: int):
    torch.manual_seed(0)
    config = replace(config_of(SMALL | {"model_type": "llama", "attention_bias": True}, "m"), heads=heads)
    shapes = {"q": heads, "k": 2, "v": 2}
    whole = {f"self_attn.{name}_proj.weight": torch.randn(count * 8, 32) for name, count in shapes.items()}
    whole |= {f"self_attn.{name}_proj.bias": torch.randn(count * 8) for name, count in shapes.items()}
    whole["self_attn.o_proj.weight"] = torch.randn(32, heads * 8)
    x = torch.randn(2, 5, 32)
    positions = torch.arange(5).expand(2, 5)

    def run(weights, seams):
        state = {name: torch.zeros(2, max(2 // seams.tp, 1), 8, 8) for name in ("k.0", "v.0")}
        writes = plan_writes(state, torch.arange(2), positions, torch.ones(2, 5, dtype=torch.bool))
        own = Pass(positions, state, writes, attend_up_to(positions)).of_layer(0)
        return attention(config, weights, seams, x, rotary_of(config, positions, x.dtype), own)

    alone = run(whole, Seams())
    ranks = []
    for rank in range(tp):
        mine = {
            name: expected_slice(f"model.layers.0.{name}", w, rank, tp, kv_heads=2, head_dim=8)
            for name, w in whole.items()
        }
        ranks.append(run(mine, Ranked(tp)))
    torch.testing.assert_close(torch.stack(ranks).sum(0), alone, atol=1e-4, rtol=1e-4)
