"""The weights of a decoder as data: each tensor's name, shape and split over ranks. Imports no torch.

Names are those of the Hugging Face checkpoint. The plan's byte counts, the sharder's slices and the graphs' inputs all
come from this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.models.config import DeltaNet, Eagle3, Experts, Markov, MarkovKind, ModelConfig

Split = Literal["replicate", "rows", "columns", "q_rows", "q_heads", "q_columns", "kv_rows", "vocab", "experts"]
Kind = Literal["linear", "embedding", "experts", "expert_biases", "vector", "index"]

NarrowWeights = Literal["int8", "int4"]
"""How a recipe stores matrices narrower than their dtype."""

OF_EXPERTS: dict[Kind, Kind] = {"experts": "linear", "expert_biases": "vector"}
"""Kinds of tensors that hold those of each expert, and the kind of these."""


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
"""The norm after the last layer."""

EXPERTS = ".experts."
"""Part of the names of experts' tensors: of all as one tensor without a number, of each with its number after it."""

LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
INPUT_PROJECTION, OF_INPUTS = "model.per_layer_model_projection.weight", "model.per_layer_projection_norm.weight"
"""What makes the inputs of all layers (`models.layer_inputs`): a row for each token, a projection and a norm."""

INPUT_GATE, FROM_INPUT, AFTER_INPUT = "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"
"""What a layer adds its input by: two linear layers and the norm after them."""

SCALAR = "layer_scalar"
"""A number of each layer by which its output is multiplied."""

HEAD = "lm_head.weight"
D2T = "d2t"
"""Offsets from the ids of a reduced vocabulary to those of the target: target id = draft id + d2t[draft id]."""

OFFSET = "rank.vocab_offset"
"""First vocabulary id of a rank's slice, not in a checkpoint; see `vocab_offset`."""

DELTA, RECENT, BASE = "delta", "recent", "base"
"""States of recurrent layers, `delta.<layer>` and `recent.<layer>`, and of a model with them: `parallel.Recurrence`."""

TAPS = 3
"""Hidden states of the target that most EAGLE-3 heads read at each position: low, middle and high layers."""

FC, INPUT_NORM, FC_NORM = "fc.weight", "input_norm.weight", "fc_norm.{}.weight"
HIDDEN_NORM = "model.layers.0.hidden_norm.weight"
TOKEN_NORM, FEATURE_NORM = "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"
"""Norms of an MTP module before `fc`."""
CONTEXT_NORM = "hidden_norm.weight"
"""The norm of a DFlash draft after `fc`."""

MARKOV = "markov_head."
"""Start of the names of a DSpark draft's Markov head: `w1` has a row for each token of the target, `w2` one for each
of the draft."""
MARKOV_W1, MARKOV_W2 = f"{MARKOV}markov_w1.weight", f"{MARKOV}markov_w2.weight"
MARKOV_GATES: dict[MarkovKind, str] = {"gated": f"{MARKOV}gate_proj", "rnn": f"{MARKOV}joint_proj"}
"""The linear layer of the kinds of Markov heads that have one."""

MASK_HIDDEN = "mask_hidden"
"""State that takes the place of the target's in a P-EAGLE head, one value for each input of `fc`."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear layers that read the same input, in the order in which one matrix holds their output features."""

BLOCK = 32
"""Rows per block: linear weights are padded to whole blocks, so every backend can store them blocked."""


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of a checkpoint.

    `shape` is the checkpoint's own. `split` is a rank's share: `rows` / `columns` an equal slice of axis 0 / 1,
    `q_rows` / `q_columns` whole query heads of axis 0 / 1, then zeros where a rank has fewer (`q_heads_of`), `q_heads`
    the same with one value for each head, `kv_rows` whole KV heads of axis 0 (each replicated when there are more ranks
    than heads), `vocab` a slice of axis 0 after padding the vocabulary, `experts` whole experts, an equal number of
    neighbours on each rank, `replicate` the whole tensor. A backend may
    change the layout of some kinds (`linear`, `embedding`: 2-D [out, in]; `experts`: [experts, out, in], of which each
    is laid out and split as a `linear`) but not of others (`vector`, `index`: 1-D; `index` is int32; `expert_biases`:
    [experts, out], of which each is split as a `vector`). `fused` are the matrices whose output features this one has
    one after the other, each with a split of its own. `expert` is the number of an expert whose own tensor this is, and
    the number of all.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    kind: Kind
    fused: tuple[WeightSpec, ...] = ()
    expert: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[WeightSpec, ...]:
        """The checkpoint's tensors that this one holds in a row: of a fused one, of each expert, or itself."""
        if self.kind not in OF_EXPERTS:
            return self.fused or (self,)
        block, _, leaf = self.name.partition(EXPERTS)
        kind, count = OF_EXPERTS[self.kind], self.shape[0]
        return tuple(
            WeightSpec(f"{block}{EXPERTS}{e}.{leaf}", self.shape[1:], self.split, kind, expert=(e, count))
            for e in range(count)
        )


INT4_GROUP = 32
"""Inputs of an output feature that share a scale in 4-bit weights."""


def takes_four_bits(name: str) -> bool:
    """Return whether `weights: int4` stores a weight in 4 bits: projections of layers, experts, a head's features.

    Embeddings, LM heads and routers are int8: llama.cpp too keeps 6 or more bits where rounding changes choices.
    """
    return name == FC or (name.endswith("_proj.weight") and not name.startswith(MARKOV))


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


def fused_specs(specs: Iterable[WeightSpec]) -> Iterator[WeightSpec]:
    """Yield the same weights, with those of `FUSED` of one block as one, in the place of the first."""
    known = {spec.name: spec for spec in specs}
    firsts = {parts[0]: (name, parts) for name, parts in FUSED.items()}
    others = {part for parts in FUSED.values() for part in parts[1:]}
    for spec in known.values():
        stem, _, leaf = spec.name.rpartition(".")
        block, _, layer = stem.rpartition(".")
        if spec.kind != "linear" or layer not in firsts.keys() | others or spec.name.startswith(MARKOV):
            yield spec
        elif layer in firsts:
            name, parts = firsts[layer]
            of_parts = (known.get(f"{block}.{part}.{leaf}") for part in parts)
            own = tuple(part for part in of_parts if part is not None)
            if len(own) == 1:  # the queries of a layer that shares keys and values
                yield spec
                continue
            rows = sum(part.shape[0] for part in own)
            yield WeightSpec(f"{block}.{name}.{leaf}", (rows, *spec.shape[1:]), spec.split, "linear", own)


def fused_name(layer: str) -> str:
    """Return the name of the weight that has a linear layer's matrix among others; empty if no weight can."""
    block, _, own = layer.rpartition(".")
    return next((f"{block}.{name}.weight" for name, parts in FUSED.items() if own in parts), "")


def _specs(c: ModelConfig) -> Iterator[WeightSpec]:
    yield WeightSpec(EMBEDDING, (c.vocab, c.hidden), "vocab", "embedding")
    if c.layer_input is not None:
        yield WeightSpec(LAYER_EMBEDDING, (c.vocab, c.layers * c.layer_input), "vocab", "embedding")
        yield WeightSpec(INPUT_PROJECTION, (c.layers * c.layer_input, c.hidden), "replicate", "linear")
        yield WeightSpec(OF_INPUTS, (c.layer_input,), "replicate", "vector")
    if c.eagle3 is not None:
        yield from _of_features(c.eagle3, c.hidden)
    for layer in range(c.layers):
        base, names = f"model.layers.{layer}", c.norms
        yield from _norm(c, base, names.before_attention)
        net = c.layer(layer).delta_net
        if net is None:
            yield from _attention(c.at(layer), layer, f"{base}.self_attn")
        else:
            yield from _delta_net(c.hidden, net, f"{base}.linear_attn")
        yield from _norm(c, base, names.after_attention)
        yield from _feed_forward(c, layer, base)
        if c.layer_input is not None:
            yield WeightSpec(f"{base}.{INPUT_GATE}.weight", (c.layer_input, c.hidden), "replicate", "linear")
            yield WeightSpec(f"{base}.{FROM_INPUT}.weight", (c.hidden, c.layer_input), "replicate", "linear")
            yield from _norm(c, base, AFTER_INPUT)
        if c.layer_scalar:
            yield WeightSpec(f"{base}.{SCALAR}", (1,), "replicate", "vector")
    yield WeightSpec(NORM, (c.hidden,), "replicate", "vector")
    if not c.tied:
        yield WeightSpec(HEAD, (c.out_vocab, c.hidden), "vocab", "linear")
    if c.draft_vocab is not None:
        yield WeightSpec(D2T, (c.draft_vocab,), "replicate", "index")
    if c.eagle3 is not None and c.eagle3.markov is not None:
        yield from _markov(c, c.eagle3.markov)


def _markov(c: ModelConfig, markov: Markov) -> Iterator[WeightSpec]:
    """Yield the weights of a Markov head."""
    rank = markov.rank
    yield WeightSpec(MARKOV_W1, (c.vocab, rank), "replicate", "embedding")
    yield WeightSpec(MARKOV_W2, (c.out_vocab, rank), "replicate", "linear")
    if markov.kind in MARKOV_GATES:
        gates, read = (rank, c.hidden + rank) if markov.kind == "gated" else (3 * rank, 2 * rank + c.hidden)
        yield WeightSpec(f"{MARKOV_GATES[markov.kind]}.weight", (gates, read), "replicate", "linear")
        yield WeightSpec(f"{MARKOV_GATES[markov.kind]}.bias", (gates,), "replicate", "vector")


def _of_features(head: Eagle3, hidden: int) -> Iterator[WeightSpec]:
    """Yield the weights that make a head's features of the target's states."""
    width = head.tap_count * head.target_hidden
    if head.mtp:
        yield WeightSpec(FC, (hidden, hidden + width), "replicate", "linear")
        for name in (TOKEN_NORM, FEATURE_NORM):
            yield WeightSpec(name, (hidden,), "replicate", "vector")
        return
    if head.block is not None:
        yield WeightSpec(FC, (hidden, width), "replicate", "linear")
        yield WeightSpec(CONTEXT_NORM, (hidden,), "replicate", "vector")
        return
    if head.norm_before_fc:
        yield WeightSpec(INPUT_NORM, (width,), "replicate", "vector")
    if head.fc_norm:
        for tap in range(head.tap_count):
            yield WeightSpec(FC_NORM.format(tap), (head.target_hidden,), "replicate", "vector")
    if not head.reads_output:
        yield WeightSpec(FC, (hidden, width), "replicate", "linear")
    if head.mask_token is not None:
        yield WeightSpec(MASK_HIDDEN, (width,), "replicate", "vector")
    if head.hidden_norm:
        yield WeightSpec(HIDDEN_NORM, (hidden,), "replicate", "vector")


def _norm(c: ModelConfig, base: str, name: str | None) -> Iterator[WeightSpec]:
    if name is not None:
        yield WeightSpec(f"{base}.{name}.weight", (c.hidden,), "replicate", "vector")


def _attention(c: ModelConfig, layer: int, base: str) -> Iterator[WeightSpec]:
    q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
    head = c.eagle3 if layer == 0 else None
    reads_both = head is not None and head.block is None and not head.mtp  # token's embedding, target's features
    width = 2 * c.hidden if reads_both else c.hidden
    parts: tuple[tuple[str, int, Split], ...] = (
        ("q", q_rows, "q_rows"),
        ("k", kv_rows, "kv_rows"),
        ("v", kv_rows, "kv_rows"),
    )
    parts = parts[:1] if c.layer(layer).shares_keys else parts
    for name, rows, split in parts:
        yield WeightSpec(f"{base}.{name}_proj.weight", (rows, width), split, "linear")
        if c.qkv_bias:
            yield WeightSpec(f"{base}.{name}_proj.bias", (rows,), split, "vector")
    if c.attention_gate:
        yield WeightSpec(f"{base}.q_gate_proj.weight", (q_rows, width), "q_rows", "linear")
        if c.qkv_bias:
            yield WeightSpec(f"{base}.q_gate_proj.bias", (q_rows,), "q_rows", "vector")
    for name, rows, split in parts[:2] if c.qk_norm else ():
        whole = c.qk_norm == "vector"
        share: Split = split if whole else "replicate"
        yield WeightSpec(f"{base}.{name}_norm.weight", (rows if whole else c.head_dim,), share, "vector")
    if c.sinks:
        yield WeightSpec(f"{base}.sinks", (c.heads,), "q_heads", "vector")
    yield WeightSpec(f"{base}.o_proj.weight", (c.hidden, q_rows), "q_columns", "linear")
    if c.out_bias:
        yield WeightSpec(f"{base}.o_proj.bias", (c.hidden,), "replicate", "vector")


def _delta_net(hidden: int, net: DeltaNet, base: str) -> Iterator[WeightSpec]:
    """Yield the weights of a gated delta net; ranks have whole heads, and a kernel of the convolution is a row."""
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
    for name, rows in (("q", keys), ("k", keys), ("v", values)):
        yield WeightSpec(f"{base}.{name}_proj.weight", (rows, hidden), "rows", "linear")
        yield WeightSpec(f"{base}.{name}_conv.weight", (rows * net.kernel,), "rows", "vector")
    for name in ("in_proj_b", "in_proj_a"):
        yield WeightSpec(f"{base}.{name}.weight", (net.value_heads, hidden), "rows", "linear")
    for name in ("A_log", "dt_bias"):
        yield WeightSpec(f"{base}.{name}", (net.value_heads,), "rows", "vector")
    yield WeightSpec(f"{base}.z_proj.weight", (values, hidden), "rows", "linear")
    yield WeightSpec(f"{base}.norm.weight", (net.value_dim,), "replicate", "vector")
    yield WeightSpec(f"{base}.out_proj.weight", (hidden, values), "columns", "linear")


def _feed_forward(c: ModelConfig, layer: int, base: str) -> Iterator[WeightSpec]:
    """Yield a layer's feed-forward network, its experts, or both, and their norms."""
    names = c.norms
    yield from _norm(c, base, names.before_mlp)
    if c.has_network(c.layer(layer)):
        yield from _mlp(c.at(layer), f"{base}.mlp")
    if (experts := c.layer(layer).experts) is not None:
        for name in (names.beside_experts, names.before_experts, names.after_experts):
            yield from _norm(c, base, name)
        yield from _experts(c, experts, f"{base}.mlp")
    yield from _norm(c, base, names.after_mlp)


def _mlp(c: ModelConfig, base: str) -> Iterator[WeightSpec]:
    for name in ("gate", "up"):
        yield WeightSpec(f"{base}.{name}_proj.weight", (c.intermediate, c.hidden), "rows", "linear")
        if c.mlp_bias:
            yield WeightSpec(f"{base}.{name}_proj.bias", (c.intermediate,), "rows", "vector")
    yield WeightSpec(f"{base}.down_proj.weight", (c.hidden, c.intermediate), "columns", "linear")
    if c.mlp_bias:
        yield WeightSpec(f"{base}.down_proj.bias", (c.hidden,), "replicate", "vector")


def _experts(c: ModelConfig, experts: Experts, base: str) -> Iterator[WeightSpec]:
    count, size = experts.count, experts.intermediate
    rows: Split = "experts" if experts.by_rank else "rows"
    columns: Split = "experts" if experts.by_rank else "columns"
    yield WeightSpec(f"{base}.gate.weight", (count, c.hidden), "replicate", "linear")
    if experts.bias:
        yield WeightSpec(f"{base}.gate.bias", (count,), "replicate", "vector")
    if experts.scaled:
        yield WeightSpec(f"{base}.gate.scale", (c.hidden,), "replicate", "vector")
        yield WeightSpec(f"{base}.gate.per_expert_scale", (count,), "replicate", "vector")
    for name in ("gate", "up"):
        yield WeightSpec(f"{base}{EXPERTS}{name}_proj.weight", (count, size, c.hidden), rows, "experts")
        if experts.bias:
            yield WeightSpec(f"{base}{EXPERTS}{name}_proj.bias", (count, size), rows, "expert_biases")
    yield WeightSpec(f"{base}{EXPERTS}down_proj.weight", (count, c.hidden, size), columns, "experts")
    if experts.bias:
        yield WeightSpec(f"{base}{EXPERTS}down_proj.bias", (count, c.hidden), "replicate", "expert_biases")
    if experts.shared is not None:
        shared = f"{base}.shared_expert"
        for name in ("gate", "up"):
            yield WeightSpec(f"{shared}.{name}_proj.weight", (experts.shared, c.hidden), "rows", "linear")
        yield WeightSpec(f"{shared}.down_proj.weight", (c.hidden, experts.shared), "columns", "linear")
        if experts.shared_gate:
            yield WeightSpec(f"{shared}_gate.weight", (1, c.hidden), "replicate", "linear")
