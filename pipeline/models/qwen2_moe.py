"""Qwen2-MoE: Qwen2 with experts in all or some layers, and one expert beside them that every token uses."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.config import Experts, ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import FULL, SLIDING, windows
from pipeline.models.qwen3_moe import of_layers
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen2MoeConfig`; every second of the first layers has the window, if it is used."""
    reject_null_head_dim(fields)
    used, last = fields.value("use_sliding_window"), fields.value("max_window_layers")
    layers = range(fields.size("num_hidden_layers"))
    types = tuple(SLIDING if used and layer % 2 == 0 and layer < last else FULL for layer in layers)
    return shared_fields(
        fields, qkv_bias=fields.value("qkv_bias"), windows=windows(fields, types), experts=experts_of_layers(fields)
    )


def experts_of_layers(fields: Fields) -> list[Experts | None]:
    """Return the experts of each layer with the one that every token uses; None where it has a feed-forward network."""
    shared = fields.size("shared_expert_intermediate_size")
    return [kind and replace(kind, shared=shared) for kind in of_layers(fields)]
