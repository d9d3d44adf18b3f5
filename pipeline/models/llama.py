"""Llama 2 and 3, SmolLM: the plain decoder, with optional biases."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.shared import shared_fields, window


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `LlamaConfig`. `attention_bias` covers q, k, v and o alike, as in transformers."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden % heads:  # whatever head_dim is: the class rejects it
        raise fields.error("hidden_size", hidden, f"expected a multiple of num_attention_heads={heads}")
    bias, mlp_bias = fields.value("attention_bias"), fields.value("mlp_bias")
    return shared_fields(fields, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, window=window(fields))
