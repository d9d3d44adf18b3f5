"""Mistral: Llama without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.fields import shared_fields


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a `MistralConfig`."""
    return shared_fields(config, where)
