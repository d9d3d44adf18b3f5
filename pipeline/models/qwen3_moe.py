"""Qwen3-MoE: Qwen3 with experts in all or some layers."""

from __future__ import annotations

from pipeline.models.config import Experts, ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen3MoeConfig`; a window, if it is used, is that of all layers."""
    reject_null_head_dim(fields)
    layers, bias = fields.size("num_hidden_layers"), fields.value("attention_bias")
    window = fields.optional_size("sliding_window") if fields.value("use_sliding_window") else None
    return shared_fields(
        fields, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=[window] * layers, experts=of_layers(fields)
    )


def of_layers(fields: Fields) -> list[Experts | None]:
    """Return the experts of each layer; None where it has a feed-forward network."""
    experts = read_experts(fields, "moe_intermediate_size", "num_experts", among=fields.value("norm_topk_prob"))
    plain, step = fields.value("mlp_only_layers") or (), fields.size("decoder_sparse_step")
    layers = range(fields.size("num_hidden_layers"))
    return [None if layer in plain or (layer + 1) % step else experts for layer in layers]
