"""Gemma 4, text models: Gemma 3 with larger heads where all keys are seen, whose values may be keys.

The last layers of smaller models share keys and values of earlier ones, and each layer has inputs of its own. A larger
model has experts beside the network of each layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.models.config import Experts, ModelConfig
from pipeline.models.experts import counted
from pipeline.models.fields import Fields, is_int, shown
from pipeline.models.gemma2 import NORMS, cap_of
from pipeline.models.layer_types import FULL, PER_LAYER, every, windows
from pipeline.models.shared import layered, shared_fields

BESIDE_EXPERTS = replace(
    NORMS, beside_experts="post_feedforward_layernorm_1", before_experts="pre_feedforward_layernorm_2",
    after_experts="post_feedforward_layernorm_2",
)  # fmt: skip

PATTERN = 6
"""One layer of so many sees all keys, where no field says so."""

HEADS = ("head_dim", "num_key_value_heads")
"""Fields that `per_layer_config` may replace."""

UNREAD = ("rope_scaling", "rope_theta", "partial_rotary_factor")
"""Fields of other families that the class does not read."""


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Gemma4TextConfig`.

    Raises:
        SourceError: layers that share keys and values of none, or other sizes by layer, by field and value.

    """
    _reject_unsupported(fields)
    layers, bias = fields.size("num_hidden_layers"), fields.value("attention_bias")
    of_layers = windows(fields, (*every(PATTERN, layers - 1), FULL))
    if of_layers[-1] is not None:
        what = f"the last layer must be {FULL}, which transformers makes of it"
        raise fields.error("layer_types", fields.value("layer_types"), what)
    experts = _experts(fields)
    own = _own_heads(fields, [layer for layer, window in enumerate(of_layers) if window is None])
    config = shared_fields(
        fields, windows=of_layers, full={**own, "values_are_keys": fields.value("attention_k_eq_v")},
        experts=[experts] * layers, norms=NORMS if experts is None else BESIDE_EXPERTS, norm_style="wide",
        qk_norm="head", v_norm=True, layer_scalar=True, qkv_bias=bias, out_bias=bias,
        embedding_scale=fields.size("hidden_size") ** 0.5, attention_scale=1.0,
        logit_cap=cap_of(fields, "final_logit_softcapping"), layer_input=_layer_input(fields),
    )  # fmt: skip
    config = _with_shared_keys(config, fields)
    for kind in config.kinds:
        if config.heads % config.of(kind).kv_heads:
            what = f"does not divide num_attention_heads={config.heads}"
            raise fields.error("num_global_key_value_heads", kind.kv_heads, what)
    return config


def _reject_unsupported(fields: Fields) -> None:
    if (kind := fields.value("use_bidirectional_attention")) not in (None, "vision"):  # of images alone
        raise fields.error("use_bidirectional_attention", kind, "this field is not supported", "use a causal model")
    for name in UNREAD:
        if fields.config.get(name) is not None:
            what = "transformers does not read this field here"
            raise fields.error(name, fields.config[name], what, "use rope_parameters")


def _experts(fields: Fields) -> Experts | None:
    """Return the experts of each layer; None of a dense model."""
    if not fields.value("enable_moe_block"):
        return None
    return counted(
        fields, "moe_intermediate_size", "num_experts", among=True, chosen="top_k_experts", scaled=True,
    )  # fmt: skip


def _layer_input(fields: Fields) -> int | None:
    """Return the size of a layer's input; None for 0, without inputs."""
    size, rows = fields.value("hidden_size_per_layer_input"), fields.size("vocab_size_per_layer_input")
    if size == 0:
        return None
    if rows != fields.size("vocab_size"):
        raise fields.error("vocab_size_per_layer_input", rows, f"expected vocab_size={fields.size('vocab_size')}")
    return fields.size("hidden_size_per_layer_input")


def _with_shared_keys(config: ModelConfig, fields: Fields) -> ModelConfig:
    """Return the config in which the last layers share keys and values, and may have networks of the double size."""
    count = fields.value("num_kv_shared_layers")
    if not 0 <= count < config.layers:
        raise fields.error("num_kv_shared_layers", count, f"expected 0 to {config.layers - 1}, fewer than all layers")
    layers = [config.layer(index) for index in range(config.layers)]
    own, sharing = layers[: config.layers - count], layers[config.layers - count :]
    if {layer.window for layer in own} != {layer.window for layer in layers}:
        what = "each type of layers needs one with keys and values of its own"
        raise fields.error("num_kv_shared_layers", count, what)
    inner = 2 * config.intermediate if fields.value("use_double_wide_mlp") else None
    sharing = [replace(layer, shares_keys=True, values_are_keys=False, intermediate=inner) for layer in sharing]
    return replace(config, **layered([*own, *sharing]))


def _own_heads(fields: Fields, full: list[int]) -> dict[str, Any]:
    """Return the size and the number of KV heads of the layers `full`, which see all keys."""
    given = fields.config.get(PER_LAYER)
    if PER_LAYER not in fields.config:
        kv_heads = fields.optional_size("num_global_key_value_heads") if fields.value("attention_k_eq_v") else None
        return {"head_dim": _even(fields, "global_head_dim", fields.size("global_head_dim")), "kv_heads": kv_heads}
    if given in (None, {}):
        return {}
    if not isinstance(given, dict) or set(given) != {str(layer) for layer in full}:
        raise fields.error(PER_LAYER, given, f"expected an entry for each layer of {FULL}: {full}")
    entries = list(given.values())
    if not isinstance(entries[0], dict) or any(entry != entries[0] for entry in entries):
        raise fields.error(PER_LAYER, given, f"expected the same entry for each layer of {FULL}")
    for name, value in entries[0].items():
        if name not in HEADS or not is_int(value) or value < 1:
            raise fields.error(f"{PER_LAYER}.{name}", value, f"expected {' and '.join(HEADS)}, positive integers")
    size, kv_heads = (entries[0].get(name) for name in HEADS)
    return {"head_dim": size and _even(fields, f"{PER_LAYER}.head_dim", size), "kv_heads": kv_heads}


def _even(fields: Fields, name: str, size: int) -> int:
    if size % 2:
        raise fields.error(name, size, f"expected an even number, for rotary embedding: {shown(size)} is odd")
    return size
