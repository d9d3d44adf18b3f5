"""Gemma 2: GeGLU, norms that scale by 1 + weight, scaled embeddings, caps on scores and logits, alternating windows."""

from __future__ import annotations

from typing import Any

from pipeline.models.config import ModelConfig, Norms
from pipeline.models.fields import Fields
from pipeline.models.layer_types import every, windows
from pipeline.models.shared import reject_partial_heads, shared_fields

NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Gemma2Config`."""
    of_layers = windows(fields, every(2, fields.size("num_hidden_layers")))
    cap = cap_of(fields, "attn_logit_softcapping")
    return shared_fields(fields, **of_gemma(fields), windows=of_layers, attention_cap=cap)


def of_gemma(fields: Fields) -> dict[str, Any]:
    """Return what Gemma 2 and 3 share."""
    reject_partial_heads(fields)
    if fields.value("use_bidirectional_attention"):
        raise fields.error("use_bidirectional_attention", True, "this field is not supported", "use a causal model")
    bias = fields.value("attention_bias")
    return {
        "norms": NORMS,
        "norm_style": "offset",
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": fields.size("hidden_size") ** 0.5,
        "attention_scale": fields.size("query_pre_attn_scalar") ** -0.5,
        "logit_cap": cap_of(fields, "final_logit_softcapping"),
    }


def cap_of(fields: Fields, key: str) -> float | None:
    """Return a cap: a positive number, or none."""
    cap: float | None = fields.value(key)
    if cap is not None and cap <= 0:
        raise fields.error(key, cap, "expected a positive number or null")
    return cap
