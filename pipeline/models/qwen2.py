"""Qwen2 and Qwen2.5: Llama with biases on q, k and v only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.fields import shared_fields


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a `Qwen2Config`."""
    return shared_fields(config, where, qkv_bias=True)
