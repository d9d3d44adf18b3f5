"""Phi-3 and Phi-4-mini: Llama whose checkpoints hold q, k and v, and both halves of SwiGLU, as one matrix each."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Phi3Config`; a window is that of all layers."""
    reject_null_head_dim(fields)
    window = fields.optional_size("sliding_window")
    return shared_fields(fields, windows=[window] * fields.size("num_hidden_layers"))
