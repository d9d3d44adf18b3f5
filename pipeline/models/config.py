"""Configuration of a decoder without its weights: sizes, kinds of layers, options. Imports no torch.

One `ModelConfig` describes every supported family; the family files (`llama.py`, `qwen2.py`, ...) only translate their
Hugging Face `config.json` into it and reject unsupported fields by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.models.draft_kind import DFLASH, DRAFT_MODEL, DSPARK, EAGLE3, MTP, P_EAGLE, DraftKind
from pipeline.models.rope_types import Rope

TapMeaning = Literal["inputs", "outputs", "unclear"]
"""What an id k in a head's file is: the input of layer k, its output, or one of both by the target's depth."""


@dataclass(frozen=True)
class TapIds:
    """Tapped layers as a head's file lists them: the field of `config.json`, its ids, and what they mean."""

    field: str
    ids: tuple[int, ...]
    meaning: TapMeaning


OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
"""Start of the names of a layer's weights."""


@dataclass(frozen=True)
class Clamp:
    """A bounded SwiGLU (gpt-oss): g sigmoid(alpha g) (u + 1) of a gate g up to `limit`, and u from -limit to limit."""

    limit: float
    alpha: float


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of a feed-forward network: a router chooses `chosen` of `count` for each token.

    `intermediate` is the size of one. Shares are the softmax of the router's scores, over all experts, or, if `among`,
    over the chosen ones, which is the same as dividing them by their sum. `by_input`: an expert's input, not its
    output, is multiplied by its share, which is the sigmoid of its score (Llama 4). `shared` is the size of a further
    expert that every token uses; with `shared_gate`, scaled by the sigmoid of a score of its own.

    `bias`: the router and all matrices have biases. `clamp`: bounds of SwiGLU. In checkpoints, `inputs_first`: matrices
    that are not quantised have the inputs first; `interleaved`: gate and up alternate in one tensor.

    `scaled`: the router reads its input normalised and scaled, and each share is multiplied by a number of its expert
    (Gemma 4).

    `by_rank`: whole experts stand on different ranks (expert parallelism), instead of a slice of each on every rank.
    """

    count: int
    chosen: int
    intermediate: int
    among: bool
    by_input: bool = False
    shared: int | None = None
    shared_gate: bool = True
    bias: bool = False
    clamp: Clamp | None = None
    inputs_first: bool = False
    interleaved: bool = False
    scaled: bool = False
    by_rank: bool = False


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net in the place of attention: numbers and sizes of heads, and its convolution's kernel.

    Each key head serves `value_heads` / `key_heads` value heads in a row. `grouped`: in checkpoints, the projections
    are two matrices whose rows go by key heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    grouped: bool = False

    def of_rank(self, tp: int) -> DeltaNet:
        """Return the net of one of `tp` ranks, which share the heads equally."""
        return replace(self, key_heads=self.key_heads // tp, value_heads=self.value_heads // tp)

    @property
    def keys(self) -> int:
        """Rows of the projection of queries, and of that of keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Rows of the projection of values."""
        return self.value_heads * self.value_dim

    @property
    def inputs(self) -> int:
        """Numbers that a row keeps of a token: q, k and v before the convolution, and two for each value head."""
        return 2 * self.keys + self.values + 2 * self.value_heads


@dataclass(frozen=True)
class Layer:
    """One kind of layer: its rotary embedding, its sliding window and its experts, where it has them.

    Without a `rope`, attention knows no positions but the order. A query sees the last `window` keys, its own included.
    `head_dim`, `kv_heads` and `intermediate` replace the model's. `values_are_keys`: values are projected as keys are,
    by the same matrix. `shares_keys`: keys and values are those of the last layer with the same window that has its
    own. A layer with a `delta_net` has no attention.
    """

    rope: Rope | None
    window: int | None = None
    experts: Experts | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    values_are_keys: bool = False
    delta_net: DeltaNet | None = None
    intermediate: int | None = None
    shares_keys: bool = False


@dataclass(frozen=True)
class Norms:
    """Names of the norms of a layer; None where there is none. Those after a block stand before the residual's sum.

    A layer with experts that has `before_experts` also has its feed-forward network: both read the residual stream
    through their own norm, and `after_mlp` reads the sum of both outputs, after `beside_experts` and `after_experts`.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    beside_experts: str | None = None
    before_experts: str | None = None
    after_experts: str | None = None


SIZES_OF_LAYERS = ("head_dim", "kv_heads", "intermediate")
"""Fields of a `Layer` that replace those of a model."""

NormStyle = Literal["narrow", "wide", "offset"]
"""How RMSNorm scales: in the model's dtype, in float32, or in float32 by 1 + weight."""

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Limit:
    """A length of caches up to which graphs compute what transformers does, and the config's field that sets it."""

    field: str
    length: int


MarkovKind = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True)
class Markov:
    """The Markov head of a DSpark draft: it adds a bias to a draft token's logits, by the token before it.

    `kind`: the bias is a matrix times `rank` values, which are those of the token before (`vanilla`), the same through
    a gate that also reads the draft's state (`gated`), or the output of a recurrent cell over the block (`rnn`).
    """

    kind: MarkovKind
    rank: int


@dataclass(frozen=True)
class Eagle3:
    """How an EAGLE-3 head (Li et al. 2025) is read: a draft over the target's hidden states, of one layer.

    `writer` is the tool that wrote the file. `taps` are the layers whose inputs the head reads, ascending; the number
    of layers means the output of the last one. They are empty until the target is known (`models.eagle3.fitted`), and
    for a head that `reads_output`: the target's output after its last norm, without `fc`. `tap_count` is their number,
    `written` what the file says of them.

    `norm_before_residual`: the residual stream starts from the normalised features. `norm_before_fc`: one norm over all
    tapped states before `fc`; `fc_norm`: one for each of them. `hidden_norm`: the features are normalised before the
    attention. `norm_output`: the head's own output is fed back after its last norm, not before.

    `mask_token` makes it a P-EAGLE head (arXiv 2602.01469), of any number of layers: from the second draft token on, it
    reads this token and the state `mask_hidden` in place of the token before and of features, so all draft tokens are
    proposed in one pass.

    `block` makes it a DFlash draft (arXiv 2602.06036), a model of `block` positions at most that are denoised in one
    pass: the newest token, and `mask_token` after it. It has none of the norms above. In `causal_layers` a position of
    the block sees only itself and those before it. With `from_anchor` the newest token's position predicts the first
    draft token, and a mask the token after its position; else a mask predicts the token at its position. `markov` makes
    it a DSpark draft. `confidence`: the file has an estimate of acceptance rates too, which nothing reads.

    `mtp` makes it the MTP module of a target (`models.mtp`): `fc` joins the token's embedding and the features, each
    normalised, and its layer is one of the target's.
    """

    target_hidden: int
    taps: tuple[int, ...] = ()
    norm_before_residual: bool = False
    writer: str = "tandem"
    tap_count: int = 3
    written: TapIds | None = None
    reads_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    hidden_norm: bool = True
    norm_output: bool = False
    mask_token: int | None = None
    block: int | None = None
    causal_layers: tuple[int, ...] = ()
    from_anchor: bool = False
    markov: Markov | None = None
    confidence: bool = False
    mtp: bool = False

    @property
    def most_drafts(self) -> int | None:
        """The most tokens that a block proposes; None for a head, which has no such limit."""
        return None if self.block is None else self.block - (not self.from_anchor)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder as data: RMSNorm, rotary attention with grouped KV heads, a gated feed-forward network or experts.

    `kinds` are the different kinds of layers, `pattern` has the kind of each layer; without it all layers are of the
    first kind. `qk_norm`: queries and keys are normalised, each head or the whole vector. `attention_scale` replaces
    1 / sqrt(head_dim). Attention scores and logits with a cap c become c tanh(x / c). `sinks`: each query head has a
    score that takes part in the softmax without a value. `v_norm`: each head of the values is normalised, without
    weights; `turned_norm`: each head of queries and keys, after it has turned, in layers with a rotary embedding.
    `layer_scalar`: the output of each layer is multiplied by a number of the checkpoint. `attention_gate`: the output
    of attention is multiplied with the sigmoid of a projection of its input, which checkpoints have in `q_proj`, beside
    the queries of each head. `layer_input`: each layer has so many inputs beside the stream (`layer_inputs.py`).

    `draft_vocab` is the size of a reduced output vocabulary (EAGLE-3 convention: target id = draft id + d2t[draft id]);
    None means the output vocabulary is `vocab`. `shares_embedding`: the checkpoint has no embedding and uses the
    target's. `shares_head`: it has no LM head and uses the target's. The plan rejects caches beyond `limits`.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    max_position: int
    kinds: tuple[Layer, ...]
    pattern: tuple[int, ...] = ()
    limits: tuple[Limit, ...] = ()
    norms: Norms = field(default_factory=Norms)
    norm_style: NormStyle = "narrow"
    activation: Activation = "silu"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "vector"] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    v_norm: bool = False
    turned_norm: bool = False
    layer_scalar: bool = False
    attention_gate: bool = False
    layer_input: int | None = None
    draft_vocab: int | None = None
    shares_embedding: bool = False
    shares_head: bool = False
    eos_ids: tuple[int, ...] = field(default=())
    eagle3: Eagle3 | None = None

    def kind(self, layer: int) -> int:
        """Return the kind of a layer, an index of `kinds`."""
        return self.pattern[layer] if self.pattern else 0

    def first(self, kind: int) -> int:
        """Return the first layer of a kind."""
        return self.pattern.index(kind) if self.pattern else 0

    def layer(self, index: int) -> Layer:
        """Return the description of a layer."""
        return self.kinds[self.kind(index)]

    def of(self, kind: Layer) -> ModelConfig:
        """Return the config with the sizes of a kind of layers."""
        own = {name: getattr(kind, name) for name in SIZES_OF_LAYERS if getattr(kind, name) is not None}
        return replace(self, **own) if own else self

    def has_network(self, kind: Layer) -> bool:
        """Return whether layers of a kind have a feed-forward network, alone or beside experts."""
        return kind.experts is None or self.norms.before_experts is not None

    def at(self, layer: int) -> ModelConfig:
        """Return the config with the sizes of a layer."""
        return self.of(self.layer(layer))

    def keys_of(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads: its own number, unless it shares those of another."""
        kind = self.layer(layer)
        if not kind.shares_keys:
            return layer
        earlier = (other for other in reversed(range(layer)) if not self.layer(other).shares_keys)
        return next(other for other in earlier if self.layer(other).window == kind.window)

    @property
    def keeping(self) -> tuple[int, ...]:
        """Layers that keep something of a row between passes: all but those that share another's keys and values."""
        return tuple(layer for layer in range(self.layers) if not self.layer(layer).shares_keys)

    def of_weight(self, name: str) -> ModelConfig:
        """Return the config with the heads of the layer of a weight, by the weight's name."""
        found = OF_LAYER.match(name) if any(kind.head_dim or kind.kv_heads for kind in self.kinds) else None
        return self if found is None else self.at(int(found[1]))

    @property
    def with_experts_by_rank(self) -> ModelConfig:
        """The config with whole experts on different ranks."""
        of_kinds = [kind.experts and replace(kind.experts, by_rank=True) for kind in self.kinds]
        kinds = [replace(kind, experts=own) for kind, own in zip(self.kinds, of_kinds, strict=True)]
        return replace(self, kinds=tuple(kinds))

    @property
    def expert_layers(self) -> tuple[Experts, ...]:
        """The experts of each layer that has them, in order."""
        of_layers = (self.layer(index).experts for index in range(self.layers))
        return tuple(experts for experts in of_layers if experts is not None)

    @property
    def delta_net(self) -> DeltaNet | None:
        """The gated delta net of recurrent layers, which is the same in all of them."""
        return next((kind.delta_net for kind in self.kinds if kind.delta_net is not None), None)

    @property
    def longest(self) -> int:
        """Length of the longest cache; a head follows its target beyond its own `max_position`."""
        own = [limit.length for limit in self.limits]
        return min(own if own and self.eagle3 is not None else [*own, self.max_position])

    @property
    def out_vocab(self) -> int:
        """Rows of the LM head."""
        return self.draft_vocab or self.vocab

    @property
    def draft_kind(self) -> DraftKind:
        """The kind of draft of this model."""
        if self.eagle3 is None:
            return DRAFT_MODEL
        if self.eagle3.block is not None:
            return DFLASH if self.eagle3.markov is None else DSPARK
        if self.eagle3.mtp:
            return MTP
        return EAGLE3 if self.eagle3.mask_token is None else P_EAGLE
