"""Olmo 2: norms after attention and the feed-forward network, none before; queries and keys normalised as vectors."""

from __future__ import annotations

from typing import Any

from pipeline.models.config import ModelConfig, Norms
from pipeline.models.fields import Fields
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import reject_null_head_dim, shared_fields

NORMS = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def read_config(fields: Fields) -> ModelConfig:
    """Translate an `Olmo2Config`."""
    return shared_fields(fields, **of_olmo(fields), limits=cache_limit(fields))


def of_olmo(fields: Fields) -> dict[str, Any]:
    """Return what Olmo 2 and 3 share."""
    reject_null_head_dim(fields)
    bias = fields.value("attention_bias")
    biases = {"qkv_bias": bias, "out_bias": bias}
    return {"norms": NORMS, "norm_style": "wide", "qk_norm": "vector", **biases}
