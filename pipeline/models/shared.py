"""The fields of `config.json` that all families share, as a `ModelConfig`. Imports no torch."""

from __future__ import annotations

from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.defaults import REFUSED
from pipeline.models.fields import Fields
from pipeline.models.rope import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"


def shared_fields(fields: Fields, **family: Any) -> ModelConfig:
    """Return a `ModelConfig` of the fields that all families share; `family` adds or overrides fields.

    Raises:
        SourceError: a value that the family's class rejects, or one that changes the computation in an unsupported way.

    """
    _reject_unsupported(fields)
    rope = read_rope(fields)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    common: dict[str, Any] = {
        "family": fields.family,
        "layers": fields.size("num_hidden_layers"),
        "hidden": hidden,
        "intermediate": fields.size("intermediate_size"),
        "heads": heads,
        "kv_heads": fields.optional_size("num_key_value_heads") or heads,
        "head_dim": fields.optional_size("head_dim")
        or fields.size("hidden_size") // fields.size("num_attention_heads"),
        "vocab": fields.size("vocab_size"),
        "norm_eps": fields.value("rms_norm_eps"),
        "rope_theta": rope.theta,
        "rope_scaling": rope.llama3,
        "rope_linear_factor": rope.linear_factor,
        "max_position": fields.size("max_position_embeddings"),
        "tied": fields.value("tie_word_embeddings"),
        "draft_vocab": fields.optional_size("draft_vocab_size"),
        "shares_embedding": fields.value("shares_embedding"),
        "eos_ids": _ids(fields.value("eos_token_id")),
    }
    return _checked(ModelConfig(**(common | family)), fields)


def _checked(config: ModelConfig, fields: Fields) -> ModelConfig:
    if config.heads % config.kv_heads:
        what = f"does not divide num_attention_heads={config.heads}"
        raise fields.error("num_key_value_heads", config.kv_heads, what)
    if config.head_dim % 2 or not config.head_dim:
        raise fields.error("head_dim", config.head_dim, "expected an even number, for rotary embedding")
    return config


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _reject_unsupported(fields: Fields) -> None:
    activation = fields.value("hidden_act")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", activation, "this activation is not supported", "use a model with silu")
    for key, neutral in REFUSED.items():
        value = fields.config.get(key)
        if value is None or value in neutral:
            continue
        what = "quantised checkpoints are" if key.endswith("n_config") else "this field is"
        raise fields.error(key, value, f"{what} not supported", "use a model without it")


def window(fields: Fields) -> int | None:
    """Return the sliding window of the layers that have one; None if no layer has one.

    Raises:
        SourceError: other kinds of layers, or layers with a window that is not set.

    """
    types = fields.value("layer_types")
    size = fields.optional_size("sliding_window")
    if fields.has("use_sliding_window") and not fields.value("use_sliding_window"):
        size = None
    layers = fields.size("num_hidden_layers")
    if types is None:
        full = fields.value("max_window_layers") if fields.has("max_window_layers") else 0
        return size if layers > full else None
    if unknown := sorted(set(types) - {FULL, SLIDING}):
        raise fields.error("layer_types", unknown, "not supported", f"use layers of {FULL} or {SLIDING}")
    if len(types) != layers:
        raise fields.error("layer_types", types, f"{len(types)} layers, but num_hidden_layers={layers}")
    if SLIDING in types and size is None:
        used = " and use_sliding_window true" if fields.has("use_sliding_window") else ""
        raise fields.error("layer_types", types, "no sliding window is set", f"set sliding_window{used}")
    return size if SLIDING in types else None
