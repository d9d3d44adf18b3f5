"""Pairs to shard, and what a rank must hold by the plain definition of each split."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.graphs.spec import ModelsSpec
from pipeline.models.weights import EMBEDDING, HEAD
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve


def pair_of(
    target: Checkpoint, draft: Checkpoint, *, tp: int = 1, dtype: str = "float32", replicated: bool = True
) -> ModelsSpec:
    return ModelsSpec(target.config, draft.config, dtype, dtype, tp, replicated)


def opened(root: Path, tmp_path: Path, **kwargs: str) -> Checkpoint:
    return resolve(str(root), base=tmp_path, cache=tmp_path / "cache", **kwargs)  # type: ignore[arg-type]


def expected_slice(name: str, whole: Tensor, rank: int, tp: int, kv_heads: int, head_dim: int) -> Tensor:
    """What a rank must hold, by the plain definition of each split."""
    if name in (EMBEDDING, HEAD):
        rows = -(-whole.shape[0] // (32 * tp)) * 32
        padded = torch.cat([whole, whole.new_zeros(rows * tp - whole.shape[0], whole.shape[1])])
        return padded[rank * rows : (rank + 1) * rows]
    if ".k_proj." in name or ".v_proj." in name:
        by_head = whole.view(kv_heads, head_dim, *whole.shape[1:])
        first = rank * kv_heads // tp
        return by_head[first : first + max(kv_heads // tp, 1)].flatten(0, 1)
    if "q_proj" in name or "gate_proj" in name or "up_proj" in name:
        return whole.chunk(tp, dim=0)[rank]
    if "o_proj.weight" in name or "down_proj.weight" in name:
        return whole.chunk(tp, dim=1)[rank]
    return whole
