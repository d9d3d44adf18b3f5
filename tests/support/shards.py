"""Pairs to shard, and what a rank must hold by the plain definition of each split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.graphs.spec import ROLES, ModelsSpec
from pipeline.models.weights import EMBEDDING, HEAD, LAYER_EMBEDDING, OFFSET, fused_specs, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve


def pair_of(
    target: Checkpoint, draft: Checkpoint, *, tp: int = 1, dtype: str = "float32", replicated: bool = True
) -> ModelsSpec:
    return ModelsSpec(target.config, draft.config, dtype, dtype, tp, replicated)


def in_out(tensors: Mapping[str, Tensor], models: ModelsSpec) -> dict[str, Tensor]:
    """Weights by their names in a signature, as `InOutPacking` stores them; from those of a checkpoint or of a rank."""
    stored = {name: tensor for name, tensor in tensors.items() if name.endswith(OFFSET)}
    for role in ROLES:
        for spec in fused_specs(weight_specs(models.config_of(role))):
            names = [f"{role}/{part.name}" for part in spec.fused or (spec,)]
            if names[0] in tensors:
                whole = torch.cat([tensors[name] for name in names])
                turned = spec.kind in ("linear", "experts")
                stored[f"{role}/{spec.name}"] = whole.transpose(-1, -2).contiguous() if turned else whole
    return stored


def opened(root: Path, tmp_path: Path, **kwargs: str) -> Checkpoint:
    return resolve(str(root), base=tmp_path, cache=tmp_path / "cache", **kwargs)  # type: ignore[arg-type]


def query_heads(whole: Tensor, axis: int, rank: int, tp: int, kv_heads: int, head_dim: int) -> Tensor:
    """The heads of each KV head, filled up with zeros to the same number on each of its ranks, then cut by ranks."""
    by_group = whole.movedim(axis, 0).unflatten(0, (kv_heads, -1, head_dim))
    share = max(tp // kv_heads, 1)
    missing = -by_group.shape[1] % share
    zeros = by_group.new_zeros(kv_heads, missing, *by_group.shape[2:])
    heads = torch.cat([by_group, zeros], dim=1).flatten(0, 1)
    return heads.chunk(tp)[rank].flatten(0, 1).movedim(0, axis)


def expected_slice(name: str, whole: Tensor, rank: int, tp: int, kv_heads: int, head_dim: int) -> Tensor:
    """What a rank must hold, by the plain definition of each split."""
    if name.endswith(("q_norm.weight", "k_norm.weight")) and len(whole) > head_dim:  # of whole vectors
        name = name.replace("_norm.", "_proj.")
    if ".experts." in name:
        return whole.chunk(tp, dim=2 if "down_proj" in name else 1)[rank]
    if ".linear_attn." in name and not name.endswith(".norm.weight"):
        return whole.chunk(tp, dim=1 if "out_proj" in name else 0)[rank]
    if name in (EMBEDDING, LAYER_EMBEDDING, HEAD):
        rows = -(-whole.shape[0] // (32 * tp)) * 32
        padded = torch.cat([whole, whole.new_zeros(rows * tp - whole.shape[0], whole.shape[1])])
        return padded[rank * rows : (rank + 1) * rows]
    if ".k_proj." in name or ".v_proj." in name:
        by_head = whole.view(kv_heads, head_dim, *whole.shape[1:])
        first = rank * kv_heads // tp
        return by_head[first : first + max(kv_heads // tp, 1)].flatten(0, 1)
    if "q_proj" in name or "o_proj.weight" in name:
        axis = 0 if "q_proj" in name else 1
        return query_heads(whole, axis, rank, tp, kv_heads, head_dim)
    if name.endswith(".sinks"):
        return query_heads(whole, 0, rank, tp, kv_heads, 1)
    if "gate_proj" in name or "up_proj" in name:
        return whole.chunk(tp, dim=0)[rank]
    if "down_proj.weight" in name:
        return whole.chunk(tp, dim=1)[rank]
    return whole
