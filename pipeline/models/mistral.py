"""Mistral: Llama without biases, with a sliding window."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import windows
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `MistralConfig`, or, with `layer_types`, the `MinistralConfig` that transformers reads it as."""
    if "layer_types" in fields.config and fields.value("head_dim") is None:
        fix = "add head_dim (hidden_size / num_attention_heads), or remove layer_types"
        raise fields.error("head_dim", None, "required beside layer_types", fix)
    of_layers, size = windows(fields), fields.value("sliding_window")
    if size is not None and not any(of_layers):  # Mistral's layers would have the window, Ministral's not
        raise fields.error("sliding_window", size, "no layer of layer_types has it", "set sliding_window to null")
    return shared_fields(fields, windows=of_layers)
