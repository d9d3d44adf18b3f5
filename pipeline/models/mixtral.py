"""Mixtral: Mistral with experts."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `MixtralConfig`; a window is that of all layers."""
    layers = fields.size("num_hidden_layers")
    experts = read_experts(fields, "intermediate_size", "num_local_experts", among=True)
    windows = [fields.optional_size("sliding_window")] * layers
    return shared_fields(fields, windows=windows, experts=[experts] * layers)
