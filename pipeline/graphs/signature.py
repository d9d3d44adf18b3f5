"""Inputs and outputs of a graph by name, shape and dtype: what tracing builds and the runtime binds. No torch.

Input order is weights, state, then arguments; outputs are results only, since state is updated in place (or aliased).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import WeightSpec, local_shape, weight_specs
from pipeline.plan.plan import GraphSpec

OFFSET = "rank.vocab_offset"
EMBEDDING = "model.embed_tokens.weight"


class PackedShape(Protocol):
    """The half of a backend's packing that needs no tensors."""

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:
        """Shape in which a weight of local `shape` is stored as `dtype`."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a signature. Names: `target/<weight>`, `draft/<state>`, or a plain argument name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """All tensors that cross a graph's border."""

    weights: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    arguments: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Everything the graph takes, in order."""
        return self.weights + self.state + self.arguments

    def to_json(self) -> dict[str, Any]:
        """Plain data for `io.json`."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Signature:
        """Read back `to_json`."""

        def tensors(key: str) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in data[key])

        return Signature(tensors("weights"), tensors("state"), tensors("arguments"), tensors("outputs"))


@dataclass(frozen=True)
class PairSpec:
    """Everything about a pair that shapes its graphs: configs, dtypes, ranks, cache size, what a step is given."""

    target: ModelConfig
    draft: ModelConfig
    target_dtype: str
    draft_dtype: str
    tp: int
    draft_replicated: bool
    rows: int
    length: int
    candidates: int | None
    target_weights: str | None = None
    draft_weights: str | None = None
    lookup: bool = False

    def tp_of(self, model: str) -> int:
        """Ranks that a model is split over."""
        return 1 if model == "draft" and self.draft_replicated else self.tp

    def config_of(self, model: str) -> ModelConfig:
        """Config of `target` or `draft`."""
        return self.draft if model == "draft" else self.target

    def dtype_of(self, model: str) -> str:
        """Dtype of a model's caches, and of its weights unless they are stored narrower."""
        return self.draft_dtype if model == "draft" else self.target_dtype

    def stored_dtype(self, model: str, kind: str) -> str:
        """Dtype in which a weight of this kind is stored."""
        if kind == "index":
            return "int32"
        shared = kind == "embedding" and self.config_of(model).shares_embedding
        narrow = self.draft_weights if model == "draft" and not shared else self.target_weights
        return narrow if narrow is not None and kind != "vector" else self.dtype_of(model)

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs the draft reads."""
        return taps_of(self.target, self.draft)

    @property
    def embedding_is_shared(self) -> bool:
        """True when the draft reads the very tensor that the target has on this rank."""
        return self.draft.shares_embedding and self.tp_of("draft") == self.tp


def models_of(spec: GraphSpec, pair: PairSpec) -> tuple[str, ...]:
    """Models that a graph runs: a head over the target's states is never scored without it."""
    whole = spec.model == "pair" or (spec.model == "draft" and pair.draft.eagle3 is not None)
    return ("target", "draft") if whole else (spec.model,)


def stored_weights(pair: PairSpec, model: str) -> list[WeightSpec]:
    """Weights that a model's own shard file holds on each rank, before the vocabulary offset."""
    specs = weight_specs(pair.config_of(model), replicated=model == "draft" and pair.draft_replicated)
    if model == "draft" and pair.embedding_is_shared:
        return [s for s in specs if s.name != EMBEDDING]
    return specs


def signature(spec: GraphSpec, pair: PairSpec, packing: PackedShape) -> Signature:
    """The signature of one graph."""
    models = models_of(spec, pair)
    return Signature(
        tuple(
            t for m in _weight_owners(spec, pair) for t in _weights(pair, m, packing, only_embedding=m not in models)
        ),
        tuple(t for m in models for t in _state(pair, m)) + _between_steps(spec, pair),
        _arguments(spec, pair),
        _outputs(spec, pair),
    )


def _weight_owners(spec: GraphSpec, pair: PairSpec) -> tuple[str, ...]:
    """A draft model alone still needs the target's embedding when it shares it."""
    if spec.model == "draft" and pair.embedding_is_shared:
        return ("target", "draft")
    return models_of(spec, pair)


def _weights(pair: PairSpec, model: str, packing: PackedShape, *, only_embedding: bool) -> list[TensorSpec]:
    config, tp = pair.config_of(model), pair.tp_of(model)
    found = []
    for spec in stored_weights(pair, model):
        if only_embedding and spec.name != EMBEDDING:
            continue
        dtype = pair.stored_dtype(model, spec.kind)
        shape = packing.packed_shape(local_shape(spec, config, tp), spec.kind, dtype)
        found.append(TensorSpec(f"{model}/{spec.name}", shape, dtype))
    if not only_embedding:
        found.append(TensorSpec(f"{model}/{OFFSET}", (1,), "int32"))
    return found


def _state(pair: PairSpec, model: str) -> list[TensorSpec]:
    config = pair.config_of(model)
    heads = max(config.kv_heads // pair.tp_of(model), 1)
    shape = (pair.rows, heads, pair.length, config.head_dim)
    return [
        TensorSpec(f"{model}/{part}.{layer}", shape, pair.dtype_of(model))
        for layer in range(config.layers)
        for part in ("k", "v")
    ]


def _between_steps(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    """What the draft keeps from one step to the next, beside its caches; see `speculation.drafters`."""
    if pair.draft.eagle3 is not None and "draft" in models_of(spec, pair):
        return (TensorSpec("draft/feature", (pair.rows, pair.draft.hidden), pair.draft_dtype),)
    return () if spec.phase == "score" else (TensorSpec("draft/tail", (pair.rows,), "int32"),)


def _arguments(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    b, t, k = spec.batch, spec.tokens, spec.draft_tokens
    if spec.phase == "score":
        return (TensorSpec("tokens", (b, t), "int32"), TensorSpec("position", (b,), "int32"))
    if spec.phase == "prefill":
        own: tuple[TensorSpec, ...] = (
            TensorSpec("tokens", (b, t), "int32"),
            TensorSpec("lengths", (b,), "int32"),
            TensorSpec("slots", (b,), "int32"),
        )
    else:
        own = (
            TensorSpec("last_token", (b,), "int32"),
            TensorSpec("position", (b,), "int32"),
            TensorSpec("active", (b,), "bool"),
        )
    if spec.phase == "speculate" and pair.lookup:
        own = (*own, TensorSpec("copied", (b, k), "int32"))
    if spec.sampling == "greedy":
        return own
    draws = 2 * k + 1 if spec.phase == "speculate" else 1
    return (
        *own,
        TensorSpec("temperature", (b,), "float32"),
        TensorSpec("top_k", (b,), "int32"),
        TensorSpec("top_p", (b,), "float32"),
        TensorSpec("uniforms", (b, draws), "float32"),
    )


def _outputs(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    b = spec.batch
    if spec.phase == "score":
        return (TensorSpec("logits", (b, spec.tokens, pair.config_of(spec.model).out_vocab), "float32"),)
    if spec.phase == "speculate":
        return (TensorSpec("tokens", (b, spec.draft_tokens + 1), "int32"), TensorSpec("count", (b,), "int32"))
    return (TensorSpec("token", (b,), "int32"),)
