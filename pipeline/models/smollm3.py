"""SmolLM3: Llama with some layers that have no rotary embedding."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import FULL, SLIDING, windows
from pipeline.models.shared import reject_null_head_dim, shared_fields


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `SmolLM3Config`; layers without the rotary embedding have the window, if it is used."""
    reject_null_head_dim(fields)
    turned = turned_layers(fields)
    used = fields.value("use_sliding_window") and fields.value("sliding_window") is not None
    types = tuple(SLIDING if used and not turns else FULL for turns in turned)
    bias, mlp_bias = fields.value("attention_bias"), fields.value("mlp_bias")
    of_layers = windows(fields, types)
    return shared_fields(fields, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, turned=turned, windows=of_layers)


def turned_layers(fields: Fields) -> list[bool]:
    """Return whether each layer has the rotary embedding."""
    layers, given = fields.size("num_hidden_layers"), fields.value("no_rope_layers")
    if given is None:
        interval = fields.size("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(given) < layers:
        raise fields.error("no_rope_layers", given, f"{len(given)} layers, but num_hidden_layers={layers}")
    return [bool(turns) for turns in given[:layers]]
