"""Llama 2 and 3, SmolLM: the plain decoder, with optional biases."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import reject_partial_heads, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `LlamaConfig`. `attention_bias` covers q, k, v and o alike, as in transformers."""
    reject_partial_heads(fields)
    bias, mlp_bias = fields.value("attention_bias"), fields.value("mlp_bias")
    return shared_fields(fields, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, limits=cache_limit(fields))
