"""The fields of `config.json` that families share, as a `ModelConfig`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pipeline.models.config import Activation, DeltaNet, Experts, Layer, Limit, ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import FULL, PER_LAYER, SLIDING
from pipeline.models.other_fields import REFUSED
from pipeline.models.rope import read_rope
from pipeline.models.rope_types import Rope

OWN_HEADS = ("gemma4_text",)
"""Families whose layers may have heads of their own, by `per_layer_config`."""

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of activation functions in transformers."""


def shared_fields(
    fields: Fields, *, windows: Sequence[int | None] = (), turned: Sequence[bool] = (),
    experts: Sequence[Experts | None] = (), delta_nets: Sequence[DeltaNet | None] = (),
    limits: tuple[Limit, ...] = (), full: Mapping[str, Any] = MappingProxyType({}), **family: Any,
) -> ModelConfig:  # fmt: skip
    """Return a `ModelConfig` of the fields that families share; `family` adds or overrides fields.

    `windows` has the sliding window of each layer, `turned` whether a layer has the rotary embedding, `experts` those
    of each layer, `delta_nets` the gated delta nets of layers without attention; empty: no layer has a window, experts
    or a delta net, all turn. `limits` are the family's own, beside those of the rotary embedding. `full` has fields of
    `Layer` for the layers without a window.

    Raises:
        SourceError: a value that the family's class rejects, or one that changes the computation in an unsupported way.

    """
    _reject_unsupported(fields)
    heads, layers = fields.size("num_attention_heads"), fields.size("num_hidden_layers")
    ropes, own_limits = read_rope(fields, head_dim(fields), full.get("head_dim"))
    of_layers = zip(*(given or [None] * layers for given in (windows, turned, experts, delta_nets)), strict=True)
    described = [_layer(ropes, full, *of_layer) for of_layer in of_layers]
    common: dict[str, Any] = {
        "family": fields.family,
        "layers": layers,
        "hidden": fields.size("hidden_size"),
        "intermediate": family.get("intermediate") or fields.size("intermediate_size"),
        "heads": heads,
        "kv_heads": fields.optional_size("num_key_value_heads") or heads,
        "head_dim": head_dim(fields),
        "vocab": fields.size("vocab_size"),
        "norm_eps": fields.value("rms_norm_eps"),
        "activation": family.get("activation") or _activation(fields),
        "max_position": fields.size("max_position_embeddings"),
        "limits": (*own_limits, *limits),
        "tied": fields.value("tie_word_embeddings"),
        "draft_vocab": fields.optional_size("draft_vocab_size"),
        "shares_embedding": fields.value("shares_embedding"),
        "eos_ids": token_ids(fields.value("eos_token_id")),
    }
    return _checked(ModelConfig(**(common | layered(described) | family)), fields)


def _layer(
    ropes: Mapping[str, Rope | None], full: Mapping[str, Any], window: int | None, turns: bool | None,
    experts: Experts | None, net: DeltaNet | None,
) -> Layer:  # fmt: skip
    """Return one layer; `full` has fields of those without a window. Layers turn unless `turns` is False."""
    rope = ropes[SLIDING if window else FULL] if turns is not False and net is None else None
    return Layer(rope, window, experts, delta_net=net, **({} if window else full))


def head_dim(fields: Fields) -> int:
    """Return the size of a head: an even number."""
    size = fields.optional_size("head_dim") or fields.size("hidden_size") // fields.size("num_attention_heads")
    if size % 2 or not size:
        raise fields.error("head_dim", size, "expected an even number, for rotary embedding")
    return size


def layered(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the kinds of layers, and their pattern, as fields of a `ModelConfig`."""
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "pattern": tuple(map(kinds.index, layers)) if len(kinds) > 1 else ()}


def reject_null_head_dim(fields: Fields) -> None:
    """Reject `head_dim: null` for a class that takes the field as it stands."""
    if fields.config.get("head_dim", 0) is None:
        fix = "remove the field (hidden_size / num_attention_heads)"
        raise fields.error("head_dim", None, "expected an integer", fix)


def reject_partial_heads(fields: Fields) -> None:
    """Reject a hidden size that heads do not divide, whatever `head_dim` is, where the class does so."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden % heads:
        raise fields.error("hidden_size", hidden, f"expected a multiple of num_attention_heads={heads}")


def _checked(config: ModelConfig, fields: Fields) -> ModelConfig:
    if config.heads % config.kv_heads:
        what = f"does not divide num_attention_heads={config.heads}"
        raise fields.error("num_key_value_heads", config.kv_heads, what)
    return config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return the ids of an `eos_token_id`."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _activation(fields: Fields) -> Activation:
    key = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    name = fields.value(key)
    if name not in ACTIVATIONS:
        fix = f"supported: {', '.join(sorted(ACTIVATIONS))}"
        raise fields.error(key, name, "this activation is not supported", fix)
    return ACTIVATIONS[name]


def _reject_unsupported(fields: Fields) -> None:
    for key, neutral in REFUSED.items():
        if fields.has(key) or (key == PER_LAYER and fields.family in OWN_HEADS):
            continue
        value = fields.config.get(key)
        if value is None or value in neutral:
            continue
        what = "this format of quantised checkpoints is" if key == "compression_config" else "this field is"
        raise fields.error(key, value, f"{what} not supported", "use a model without it")
