"""gpt-oss: sinks and biases in attention, a window in every second layer, experts with biases and a bounded SwiGLU."""

from __future__ import annotations

from pipeline.models.config import Clamp, ModelConfig
from pipeline.models.experts import counted
from pipeline.models.fields import Fields, shown
from pipeline.models.layer_types import every, windows
from pipeline.models.rope import given, rules_of
from pipeline.models.shared import shared_fields

OLDER_ROPE = {
    "initial_context_length": "original_max_position_embeddings", "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow", "rope_ntk_beta": "beta_fast",
}  # fmt: skip
"""Fields of the first release, which other readers of these checkpoints take, and what transformers reads instead."""


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `GptOssConfig`; its class does not read `hidden_act`.

    Raises:
        SourceError: bounds of SwiGLU that are not positive, or fields of the first release that differ.

    """
    fields.value("hidden_act")  # of its type
    layers, bias, limit = fields.size("num_hidden_layers"), fields.value("attention_bias"), fields.value("swiglu_limit")
    if limit <= 0:
        raise fields.error("swiglu_limit", limit, "expected a positive number")
    experts = counted(
        fields, "intermediate_size", "num_local_experts", among=True,
        bias=True, clamp=Clamp(limit, fields.value("swiglu_alpha")), inputs_first=True, interleaved=True,
    )  # fmt: skip
    config = shared_fields(
        fields, qkv_bias=bias, out_bias=bias, sinks=True, norm_style="wide", activation="silu",
        windows=windows(fields, every(2, layers)), experts=[experts] * layers,
    )  # fmt: skip
    _reject_other_meanings(fields)
    return config


def _reject_other_meanings(fields: Fields) -> None:
    """Reject fields of the first release, which transformers ignores, if they contradict those that it reads."""
    rope = given(fields.config, rules_of(fields.family))
    read = {older: (f"{key} of the rotary embedding", rope.get(key)) for older, key in OLDER_ROPE.items()}
    read["experts_per_token"] = ("num_experts_per_tok", fields.value("num_experts_per_tok"))
    for older, (name, value) in read.items():
        if older in fields.config and fields.config[older] != value:
            raise fields.error(older, fields.config[older], f"{name}={shown(value)} differs", "remove one of the two")
