"""Granite-MoE: Granite with experts."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.granite import multipliers
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `GraniteMoeConfig`."""
    reject_null_head_dim(fields)
    bias = fields.value("attention_bias")
    experts = read_experts(fields, "intermediate_size", "num_local_experts", among=True)
    return shared_fields(
        fields, qkv_bias=bias, out_bias=bias, **multipliers(fields), limits=cache_limit(fields),
        experts=[experts] * fields.size("num_hidden_layers"),
    )  # fmt: skip
