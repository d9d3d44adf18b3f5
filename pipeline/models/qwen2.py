"""Qwen2 and Qwen2.5: Llama with biases on q, k and v only."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.shared import shared_fields, window


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen2Config`; it does not resolve a `head_dim` of null."""
    if fields.config.get("head_dim", 0) is None:
        raise fields.error(
            "head_dim", None, "expected an integer", "remove the field (hidden_size / num_attention_heads)"
        )
    return shared_fields(fields, qkv_bias=True, window=window(fields))
