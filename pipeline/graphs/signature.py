"""Inputs and outputs of a graph by name, shape and dtype, for tracing and for the runtime. Imports no torch.

Input order is weights, state, then arguments; outputs are results only: state is updated in place (or aliased).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import CorruptError
from pipeline.files.limits import AGAIN, json_object
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec, Role
from pipeline.models.rank_slices import local_shape
from pipeline.models.weights import BASE, DELTA, EMBEDDING, OFFSET, RECENT, WeightSpec, fused_specs, weight_specs


class PackedShape(Protocol):
    """The part of a backend's packing that needs no tensors."""

    fuses: bool

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:
        """Return the shape in which a weight of local `shape` is stored as `dtype`."""
        ...


SHAPING = (
    "bias", "counts", "prompted", "allowed", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
"""Arguments of a verify graph: the fields of `speculation.shaping.Shaping`, in their order."""
EXPERTS_OUT = "experts"
"""Output of `score` graphs: the experts that each layer with experts chose for each token."""

WORD_BITS = 32
"""Tokens of a word of an `allowed` argument."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a signature. Names: `target/<weight>`, `draft/<state>`, or a plain argument name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a graph."""

    weights: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    arguments: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs of the graph, in order."""
        return self.weights + self.state + self.arguments

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `io.json`."""
        return asdict(self)


def read_signature(path: Path) -> Signature:
    """Return the signature of a graph, the file `io.json`.

    Raises:
        CorruptError: the file is not what `to_json` returns.

    """
    data = json_object(path.read_bytes(), str(path), "signature of the graph")
    try:
        parts = (tuple(map(tensor_of, data[key])) for key in ("weights", "state", "arguments", "outputs"))
        return Signature(*parts)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError("damaged signature of the graph", where=str(path), fix=AGAIN) from error


def tensor_of(data: Mapping[str, Any]) -> TensorSpec:
    """Return a tensor from plain data.

    Raises:
        KeyError, TypeError, ValueError: other fields, or values of other types.

    """
    name, shape, dtype = data["name"], tuple(data["shape"]), data["dtype"]
    if not (isinstance(name, str) and isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"not a tensor: {data}")
    return TensorSpec(name, shape, dtype)


def is_recurrent(name: str) -> bool:
    """Return whether a state has one entry for a row, which is that of all its tokens: it cannot be cut."""
    leaf = name.partition("/")[2]
    return leaf == BASE or leaf.startswith((f"{DELTA}.", f"{RECENT}."))


def stored_weights(models: ModelsSpec, role: Role, *, fused: bool = False) -> list[WeightSpec]:
    """Return the weights in a model's own shard file on each rank, without the vocabulary offset.

    `fused`: as a packing stores them that `fuses`.
    """
    specs = weight_specs(models.config_of(role), replicated=role == "draft" and models.draft_replicated)
    specs = list(fused_specs(specs)) if fused else specs
    if role == "draft" and models.embedding_is_shared:
        return [weight for weight in specs if weight.name != EMBEDDING]
    return specs


def signature(spec: GraphSpec, pair: PairSpec, packing: PackedShape) -> Signature:
    """Return the signature of one graph."""
    roles = pair.roles_of(spec)
    weights = (
        tensor
        for role in _weight_owners(spec, pair)
        for tensor in _weights(pair.models, role, packing, only_embedding=role not in roles)
    )
    caches = tuple(tensor for role in roles for tensor in _caches(pair, role))
    return Signature(tuple(weights), caches + _between_steps(spec, pair), _arguments(spec, pair), _outputs(spec, pair))


def _weight_owners(spec: GraphSpec, pair: PairSpec) -> tuple[Role, ...]:
    """Return the models whose weights a graph reads: a draft model also reads an embedding that it shares."""
    if pair.roles_of(spec) == ("draft",) and pair.models.embedding_is_shared:
        return ("target", "draft")
    return pair.roles_of(spec)


def _weights(
    models: ModelsSpec, role: Role, packing: PackedShape, *, only_embedding: bool
) -> Iterator[TensorSpec]:  # fmt: skip
    config, tp = models.config_of(role), models.tp_of(role)
    for weight in stored_weights(models, role, fused=packing.fuses):
        if only_embedding and weight.name != EMBEDDING:
            continue
        dtype = models.stored_dtype(role, weight)
        shape = packing.packed_shape(local_shape(weight, config, tp), weight.kind, dtype)
        yield TensorSpec(f"{role}/{weight.name}", shape, dtype)
    if not only_embedding:
        yield TensorSpec(f"{role}/{OFFSET}", (1,), "int32")


def _caches(pair: PairSpec, role: Role) -> Iterator[TensorSpec]:
    config, dtype = pair.models.config_of(role), pair.models.dtype_of(role)
    for layer in config.keeping:
        net = config.layer(layer).delta_net
        if net is not None:
            own = net.of_rank(pair.models.tp_of(role))
            matrices = (pair.rows, own.value_heads, own.key_dim, own.value_dim)
            yield TensorSpec(f"{role}/{DELTA}.{layer}", matrices, "float32")
            yield TensorSpec(f"{role}/{RECENT}.{layer}", (pair.rows, net.kernel - 1 + pair.replayed, own.inputs), dtype)
            continue
        length = pair.cache_length(role, layer)
        shape = (pair.rows, pair.models.kv_heads_of(role, layer), length, config.at(layer).head_dim)
        for part in ("k", "v"):
            yield TensorSpec(f"{role}/{part}.{layer}", shape, dtype)
    if config.delta_net is not None:
        yield TensorSpec(f"{role}/{BASE}", (pair.rows,), "int32")


def _between_steps(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    """Return the draft's state between steps other than its caches; see `speculation.drafters`."""
    kind = pair.models.draft_kind
    if kind.keeps_features and "draft" in pair.roles_of(spec):
        return (TensorSpec("draft/feature", (pair.rows, pair.draft.hidden), pair.models.draft_dtype),)
    if kind.reads_target_states:
        return ()
    return () if spec.phase == "score" else (TensorSpec("draft/tail", (pair.rows,), "int32"),)


def _arguments(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    b, t, k = spec.batch, spec.tokens, spec.draft_tokens
    if spec.phase == "score":
        scored = (TensorSpec("tokens", (b, t), "int32"), TensorSpec("position", (b,), "int32"))
        # Padding must not enter recurrent states; keys and values of it are overwritten later.
        return (*scored, TensorSpec("lengths", (b,), "int32")) if pair.has_recurrence(spec) else scored
    if spec.phase == "prefill":
        own: tuple[TensorSpec, ...] = (
            TensorSpec("tokens", (b, t), "int32"),
            TensorSpec("lengths", (b,), "int32"),
            TensorSpec("slots", (b,), "int32"),
            *((TensorSpec("position", (b,), "int32"),) if spec.continues else ()),
        )
    else:
        own = (
            TensorSpec("last_token", (b,), "int32"),
            TensorSpec("position", (b,), "int32"),
            TensorSpec("active", (b,), "bool"),
        )
    if spec.phase in ("speculate", "propose") and pair.lookup:
        own = (*own, TensorSpec("copied", (b, k), "int32"))
    if spec.phase == "verify":
        own = (*own, TensorSpec("drafts", (b, k), "int32"), *_shaping(spec, pair))
    if spec.sampling == "greedy":
        return own
    return (
        *own,
        TensorSpec("temperature", (b,), "float32"),
        TensorSpec("top_k", (b,), "int32"),
        TensorSpec("top_p", (b,), "float32"),
        TensorSpec("seed", (b, 2), "int32"),
    )


def _shaping(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    """Return the arguments of `speculation.shaping`."""
    b, vocab = spec.batch, pair.target.out_vocab
    bias, counts, prompted, allowed, *of_row = SHAPING
    return (
        TensorSpec(bias, (b, vocab), "float32"),
        TensorSpec(counts, (b, vocab), "int32"),
        TensorSpec(prompted, (b, vocab), "bool"),
        TensorSpec(allowed, (b, spec.tokens, -(-vocab // WORD_BITS)), "int32"),
        *(TensorSpec(name, (b,), "float32") for name in of_row),
    )


def _outputs(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    b = spec.batch
    if spec.phase == "score":
        return _scores(spec, pair)
    if spec.phase == "propose":
        return (TensorSpec("drafts", (b, spec.draft_tokens), "int32"),)
    if spec.phase in ("speculate", "verify"):
        emitted = (TensorSpec("tokens", (b, spec.draft_tokens + 1), "int32"), TensorSpec("count", (b,), "int32"))
        return emitted if spec.phase == "speculate" else (*emitted, *_log_probs(spec, pair))
    return (TensorSpec("token", (b,), "int32"),)


def _scores(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    """Return the outputs of `speculation.drafters.Scores`: a head runs the layers of the target, too."""
    config = pair.draft if spec.model == "draft" else pair.target
    logits = TensorSpec("logits", (spec.batch, spec.tokens, config.out_vocab), "float32")
    layers = (pair.target if config.draft_kind.reads_target_states else config).expert_layers
    if not layers:
        return (logits,)
    return (logits, TensorSpec(EXPERTS_OUT, (spec.batch, spec.tokens, len(layers), layers[0].chosen), "int32"))


def _log_probs(spec: GraphSpec, pair: PairSpec) -> tuple[TensorSpec, ...]:
    """Return the outputs of `speculation.shaping.LogProbs`."""
    b, t, n = spec.batch, spec.tokens, min(spec.logprobs, pair.target.out_vocab)
    return (
        TensorSpec("logprobs", (b, t), "float32"),
        TensorSpec("ranks", (b, t), "int32"),
        TensorSpec("top_logprobs", (b, t, n), "float32"),
        TensorSpec("top_ids", (b, t, n), "int32"),
    )
