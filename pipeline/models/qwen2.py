"""Qwen2 and Qwen2.5: Llama with biases on q, k and v only."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import windows
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen2Config`; it does not resolve a `head_dim` of null."""
    reject_null_head_dim(fields)
    return shared_fields(fields, qkv_bias=True, windows=windows(fields))
