"""Qwen3: RMSNorm over each query and key head before the rotary embedding."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import windows
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen3Config`."""
    bias = fields.value("attention_bias")
    return shared_fields(fields, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=windows(fields))
