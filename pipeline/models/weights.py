"""The weights of a decoder as data: each tensor's name, shape and split over ranks. Imports no torch.

Names are those of the Hugging Face checkpoint. The plan's byte counts, the sharder's slices and the graphs' inputs all
come from this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.models.config import Eagle3, ModelConfig

Split = Literal["replicate", "rows", "columns", "q_rows", "q_columns", "kv_rows", "vocab"]
Kind = Literal["linear", "embedding", "vector", "index"]

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
"""The norm after the last layer."""

HEAD = "lm_head.weight"
D2T = "d2t"
"""Offsets from the ids of a reduced vocabulary to those of the target: target id = draft id + d2t[draft id]."""

OFFSET = "rank.vocab_offset"
"""First vocabulary id of a rank's slice, not in a checkpoint; see `vocab_offset`."""

TAPS = 3
"""Hidden states of the target that most EAGLE-3 heads read at each position: low, middle and high layers."""

FC, INPUT_NORM, FC_NORM = "fc.weight", "input_norm.weight", "fc_norm.{}.weight"
HIDDEN_NORM = "model.layers.0.hidden_norm.weight"

BLOCK = 32
"""Rows per block: linear weights are padded to whole blocks, so every backend can store them blocked."""


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of a checkpoint.

    `shape` is the checkpoint's own. `split` is a rank's share: `rows` / `columns` an equal slice of axis 0 / 1,
    `q_rows` / `q_columns` whole query heads of axis 0 / 1, then zeros where a rank has fewer (`q_heads_of`), `kv_rows`
    whole KV heads of axis 0 (each replicated when there are more ranks than heads), `vocab` a slice of axis 0 after
    padding the vocabulary, `replicate` the whole tensor. A backend may change the layout of some kinds (`linear`,
    `embedding`: 2-D [out, in]) but not of others (`vector`, `index`: 1-D; `index` is int32).
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    kind: Kind


def up_to(value: int, multiple: int) -> int:
    """Return `value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def weight_specs(config: ModelConfig, *, replicated: bool = False) -> list[WeightSpec]:
    """Return every tensor that `config` needs, in checkpoint order.

    `replicated` (a replicated draft) keeps all tensors whole on each rank. The list of a model that shares the target's
    embedding has the embedding too: the shard plan decides which model stores it.
    """
    specs = list(_specs(config))
    if not replicated:
        return specs
    return [WeightSpec(s.name, s.shape, "replicate", s.kind) for s in specs]


def _specs(c: ModelConfig) -> Iterator[WeightSpec]:  # noqa: C901 - a table, not logic
    q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
    yield WeightSpec(EMBEDDING, (c.vocab, c.hidden), "vocab", "embedding")
    width = c.hidden
    if c.eagle3 is not None:  # its layer reads a token's embedding and the target's features, concatenated
        width = 2 * c.hidden
        yield from _of_features(c.eagle3, c.hidden)
    for layer in range(c.layers):
        base = f"model.layers.{layer}"
        yield WeightSpec(f"{base}.input_layernorm.weight", (c.hidden,), "replicate", "vector")
        for name, rows, split in (("q", q_rows, "q_rows"), ("k", kv_rows, "kv_rows"), ("v", kv_rows, "kv_rows")):
            yield WeightSpec(f"{base}.self_attn.{name}_proj.weight", (rows, width), split, "linear")  # type: ignore[arg-type]
            if c.qkv_bias:
                yield WeightSpec(f"{base}.self_attn.{name}_proj.bias", (rows,), split, "vector")  # type: ignore[arg-type]
        if c.qk_norm:
            yield WeightSpec(f"{base}.self_attn.q_norm.weight", (c.head_dim,), "replicate", "vector")
            yield WeightSpec(f"{base}.self_attn.k_norm.weight", (c.head_dim,), "replicate", "vector")
        yield WeightSpec(f"{base}.self_attn.o_proj.weight", (c.hidden, q_rows), "q_columns", "linear")
        if c.out_bias:
            yield WeightSpec(f"{base}.self_attn.o_proj.bias", (c.hidden,), "replicate", "vector")
        yield WeightSpec(f"{base}.post_attention_layernorm.weight", (c.hidden,), "replicate", "vector")
        for name in ("gate", "up"):
            yield WeightSpec(f"{base}.mlp.{name}_proj.weight", (c.intermediate, c.hidden), "rows", "linear")
            if c.mlp_bias:
                yield WeightSpec(f"{base}.mlp.{name}_proj.bias", (c.intermediate,), "rows", "vector")
        yield WeightSpec(f"{base}.mlp.down_proj.weight", (c.hidden, c.intermediate), "columns", "linear")
        if c.mlp_bias:
            yield WeightSpec(f"{base}.mlp.down_proj.bias", (c.hidden,), "replicate", "vector")
    yield WeightSpec(NORM, (c.hidden,), "replicate", "vector")
    if not c.tied:
        yield WeightSpec(HEAD, (c.out_vocab, c.hidden), "vocab", "linear")
    if c.draft_vocab is not None:
        yield WeightSpec(D2T, (c.draft_vocab,), "replicate", "index")


def _of_features(head: Eagle3, hidden: int) -> Iterator[WeightSpec]:
    """Yield the weights that make an EAGLE-3 head's features of the target's states."""
    width = head.tap_count * head.target_hidden
    if head.norm_before_fc:
        yield WeightSpec(INPUT_NORM, (width,), "replicate", "vector")
    if head.fc_norm:
        for tap in range(head.tap_count):
            yield WeightSpec(FC_NORM.format(tap), (head.target_hidden,), "replicate", "vector")
    if not head.reads_output:
        yield WeightSpec(FC, (hidden, width), "replicate", "linear")
    if head.hidden_norm:
        yield WeightSpec(HIDDEN_NORM, (hidden,), "replicate", "vector")


def local_shape(spec: WeightSpec, config: ModelConfig, tp: int) -> tuple[int, ...]:
    """Return the shape of one rank's slice before packing; a split vocabulary is padded to whole blocks per rank."""
    head, *rest = spec.shape
    if spec.split == "rows":
        return (head // tp, *rest)
    if spec.split == "columns":
        return (head, rest[0] // tp)
    if spec.split == "q_rows":
        return (local_heads(config, tp) * config.head_dim, *rest)
    if spec.split == "q_columns":
        return (head, local_heads(config, tp) * config.head_dim)
    if spec.split == "kv_rows":
        return (max(config.kv_heads // tp, 1) * config.head_dim, *rest)
    if spec.split == "vocab":
        return (padded_vocab(head, tp) // tp, *rest)
    return spec.shape


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
