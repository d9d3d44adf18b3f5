"""Llama 2 and 3, SmolLM: the plain decoder, with optional biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.fields import shared_fields


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a `LlamaConfig`. `attention_bias` covers q, k, v and o alike, as in transformers."""
    bias = bool(config.get("attention_bias", False))
    return shared_fields(config, where, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
