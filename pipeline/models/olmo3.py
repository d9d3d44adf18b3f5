"""Olmo 3: Olmo 2 with a sliding window in three of four layers, and a rotary embedding for each type of layers."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import every, windows
from pipeline.models.olmo2 import of_olmo
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate an `Olmo3Config`."""
    of_layers = windows(fields, every(4, fields.size("num_hidden_layers")))
    return shared_fields(fields, **of_olmo(fields), windows=of_layers)
