"""gpt-oss: sinks and biases in attention, a window in every second layer, experts with biases and a bounded SwiGLU."""

from __future__ import annotations

from pipeline.models.config import Clamp, ModelConfig
from pipeline.models.experts import counted
from pipeline.models.fields import Fields
from pipeline.models.layer_types import every, windows
from pipeline.models.shared import shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `GptOssConfig`; its class does not read `hidden_act`.

    Raises:
        SourceError: bounds of SwiGLU that are not positive.

    """
    fields.value("hidden_act")  # of its type
    layers, bias, limit = fields.size("num_hidden_layers"), fields.value("attention_bias"), fields.value("swiglu_limit")
    if limit <= 0:
        raise fields.error("swiglu_limit", limit, "expected a positive number")
    experts = counted(
        fields, "intermediate_size", "num_local_experts", among=True,
        bias=True, clamp=Clamp(limit, fields.value("swiglu_alpha")), interleaved=True,
    )  # fmt: skip
    return shared_fields(
        fields, qkv_bias=bias, out_bias=bias, sinks=True, norm_style="wide", activation="silu",
        windows=windows(fields, every(2, layers)), experts=[experts] * layers,
    )  # fmt: skip
