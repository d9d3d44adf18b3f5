"""Granite 3 (dense): Llama with multipliers on the embedding, the residual stream, attention scores and logits."""

from __future__ import annotations

from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `GraniteConfig`."""
    reject_null_head_dim(fields)
    bias, mlp_bias = fields.value("attention_bias"), fields.value("mlp_bias")
    biases = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": mlp_bias}
    return shared_fields(fields, **biases, **multipliers(fields), limits=cache_limit(fields))


def multipliers(fields: Fields) -> dict[str, Any]:
    """Return Granite's multipliers."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    if empty := [name for name in names if fields.value(name) is None]:
        raise fields.error(empty[0], None, "expected a number")
    if not (divisor := fields.value("logits_scaling")):
        raise fields.error("logits_scaling", divisor, "expected a number other than 0")
    return {
        "embedding_scale": float(fields.value("embedding_multiplier")),
        "residual_scale": float(fields.value("residual_multiplier")),
        "attention_scale": float(fields.value("attention_multiplier")),
        "logit_scale": 1 / divisor,
    }
