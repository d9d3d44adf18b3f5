"""Qwen3.5, the text model, dense and with experts: Qwen3-Next whose projections are stored one by one."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.config import ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.qwen3_next import of_qwen3_next


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen3_5TextConfig` or a `Qwen3_5MoeTextConfig`, whose layers all have experts."""
    if not fields.has("num_experts"):
        return of_qwen3_next(fields)
    experts = read_experts(fields, "moe_intermediate_size", "num_experts", among=True)
    experts = replace(experts, shared=fields.size("shared_expert_intermediate_size"))
    layers = fields.size("num_hidden_layers")
    return of_qwen3_next(fields, experts=[experts] * layers, intermediate=experts.intermediate)
