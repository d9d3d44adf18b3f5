"""Gemma 3, the text model: Gemma 2 with norms of query and key heads, and a rotary embedding by type of layers."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.gemma2 import of_gemma
from pipeline.models.layer_types import every, windows
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Gemma3TextConfig`; its cap on attention scores has no effect in transformers either."""
    pattern = fields.size("sliding_window_pattern")
    of_layers = windows(fields, every(pattern, fields.size("num_hidden_layers")))
    return shared_fields(fields, **of_gemma(fields), qk_norm="head", windows=of_layers)
