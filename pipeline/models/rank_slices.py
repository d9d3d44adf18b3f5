"""What a rank has of each weight and of the heads: sizes and ranges of its slices. Imports no torch."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.weights import BLOCK, OF_EXPERTS, WeightSpec, up_to


def local_shape(spec: WeightSpec, config: ModelConfig, tp: int) -> tuple[int, ...]:
    """Return the shape of one rank's slice before packing; a split vocabulary is padded to whole blocks per rank."""
    config = config.of_weight(spec.name)
    head, *rest = spec.shape
    if spec.fused:
        return (sum(local_shape(part, config, tp)[0] for part in spec.fused), *rest)
    if spec.kind in OF_EXPERTS:
        return (head // tp if spec.split == "experts" else head, *local_shape(spec.parts[0], config, tp))
    if spec.split == "rows":
        return (head // tp, *rest)
    if spec.split == "columns":
        return (head, rest[0] // tp)
    if spec.split == "q_rows":
        return (local_heads(config, tp) * config.head_dim, *rest)
    if spec.split == "q_heads":
        return (local_heads(config, tp),)
    if spec.split == "q_columns":
        return (head, local_heads(config, tp) * config.head_dim)
    if spec.split == "kv_rows":
        return (max(config.kv_heads // tp, 1) * config.head_dim, *rest)
    if spec.split == "vocab":
        return (padded_vocab(head, tp) // tp, *rest)
    return spec.shape


def owner(expert: tuple[int, int], tp: int) -> int:
    """Return the rank of an expert, of so many, whose experts are neighbours."""
    number, count = expert
    return number * tp // count


def padded_vocab(vocab: int, tp: int) -> int:
    """Return the vocabulary rows after padding, with whole blocks on each of `tp` ranks."""
    return up_to(vocab, BLOCK * tp)


def vocab_offset(rows_per_rank: int, rank: int) -> int:
    """Return the first vocabulary id of a rank's slice; a per-rank weight, so that all ranks share one graph."""
    return rows_per_rank * rank


def local_heads(config: ModelConfig, tp: int) -> int:
    """Return the query heads on each rank: an equal share, rounded up where ranks share a KV head."""
    if tp <= config.kv_heads:
        return config.heads // tp
    return -(-(config.heads // config.kv_heads) // (tp // config.kv_heads))


def q_heads_of(rank: int, config: ModelConfig, tp: int) -> tuple[int, int]:
    """Return the half-open range of the checkpoint's query heads on `rank`, of the KV head on it.

    It is shorter than `local_heads` where the heads of a KV head do not fill its ranks, as NxD Inference pads them: the
    rest is zeros, which add nothing to the attention's output.
    """
    share = local_heads(config, tp)
    if tp <= config.kv_heads:
        return rank * share, (rank + 1) * share
    group, ranks = config.heads // config.kv_heads, tp // config.kv_heads
    start = rank // ranks * group
    first = min(rank % ranks * share, group)
    return start + first, start + min(first + share, group)


def kv_head_of(rank: int, config: ModelConfig, tp: int) -> tuple[int, int]:
    """Return the half-open range of the checkpoint's KV heads on `rank`."""
    if tp <= config.kv_heads:
        per_rank = config.kv_heads // tp
        return rank * per_rank, (rank + 1) * per_rank
    head = rank // (tp // config.kv_heads)
    return head, head + 1
