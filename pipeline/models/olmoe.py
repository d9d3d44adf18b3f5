"""OLMoE: experts, and queries and keys normalised as vectors, with the norms of Llama."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import head_dim, reject_null_head_dim, reject_partial_heads, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate an `OlmoeConfig`."""
    reject_null_head_dim(fields)
    reject_partial_heads(fields)
    if (clip := fields.value("clip_qkv")) is not None:
        raise fields.error("clip_qkv", clip, "this field is not supported", "use a model without it")
    if head_dim(fields) * fields.size("num_attention_heads") != fields.size("hidden_size"):
        what = "expected hidden_size / num_attention_heads: the norm of queries has hidden_size values"
        raise fields.error("head_dim", head_dim(fields), what, "remove the field")
    bias = fields.value("attention_bias")
    experts = read_experts(fields, "intermediate_size", "num_experts", among=fields.value("norm_topk_prob"))
    return shared_fields(
        fields, qk_norm="vector", qkv_bias=bias, out_bias=bias, limits=cache_limit(fields),
        experts=[experts] * fields.size("num_hidden_layers"),
    )  # fmt: skip
