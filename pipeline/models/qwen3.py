"""Qwen3: RMSNorm over each query and key head before the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.fields import shared_fields


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a `Qwen3Config`; its `head_dim` defaults to 128 whatever the hidden size."""
    bias = bool(config.get("attention_bias", False))
    head_dim = int(config.get("head_dim") or 128)
    return shared_fields(config, where, qk_norm=True, head_dim=head_dim, qkv_bias=bias, out_bias=bias)
