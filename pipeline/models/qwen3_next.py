"""Qwen3-Next and Qwen3.5: most layers are gated delta nets, the others have attention with a gate on its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.models.config import DeltaNet, Experts, ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.layer_types import FULL, LINEAR, linear_layers
from pipeline.models.qwen2_moe import experts_of_layers
from pipeline.models.shared import shared_fields

LEAST_KERNEL = 2


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Qwen3NextConfig`: experts in all or some layers, and one more that every token uses."""
    return of_qwen3_next(fields, experts=experts_of_layers(fields), grouped=True)


def of_qwen3_next(
    fields: Fields, *, experts: Sequence[Experts | None] = (), grouped: bool = False, **family: Any
) -> ModelConfig:  # fmt: skip
    """Return the config of a model whose layers are those of Qwen3-Next; `grouped` as in `DeltaNet`."""
    if fields.value("hidden_act") not in ("silu", "swish"):
        raise fields.error("hidden_act", fields.value("hidden_act"), "this activation is not supported", "use silu")
    types, bias = linear_layers(fields), fields.value("attention_bias")
    if FULL not in types:
        raise fields.error("layer_types", types, "not supported", f"use at least one layer of {FULL}")
    net = delta_net(fields, grouped=grouped)
    return shared_fields(
        fields, qk_norm="head", qkv_bias=bias, out_bias=bias, norm_style="offset", attention_gate=True,
        experts=experts, delta_nets=[net if kind == LINEAR else None for kind in types], **family,
    )  # fmt: skip


def delta_net(fields: Fields, *, grouped: bool) -> DeltaNet:
    """Return the gated delta net of a config.

    Raises:
        SourceError: key heads that do not divide the value heads, or a convolution of one token.

    """
    net = DeltaNet(
        fields.size("linear_num_key_heads"), fields.size("linear_num_value_heads"), fields.size("linear_key_head_dim"),
        fields.size("linear_value_head_dim"), fields.size("linear_conv_kernel_dim"), grouped,
    )  # fmt: skip
    if net.value_heads % net.key_heads:
        what = f"does not divide linear_num_value_heads={net.value_heads}"
        raise fields.error("linear_num_key_heads", net.key_heads, what)
    if net.kernel < LEAST_KERNEL:
        raise fields.error("linear_conv_kernel_dim", net.kernel, f"expected {LEAST_KERNEL} or more")
    return net
