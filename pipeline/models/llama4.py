"""Llama 4, text: experts whose inputs are scaled, beside one of every token, and layers without a rotary embedding.

Layers with a rotary embedding attend within chunks of the text, and queries of the others grow with their position:
both only beyond lengths of the config, which are therefore limits of caches. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.config import Experts, Limit, ModelConfig
from pipeline.models.experts import read_experts
from pipeline.models.fields import Fields
from pipeline.models.layer_types import CHUNK, CHUNKED, FULL, layer_types
from pipeline.models.shared import shared_fields
from pipeline.models.smollm3 import turned_layers

FLOOR = "floor_scale"


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Llama4TextConfig`."""
    layers, bias = fields.size("num_hidden_layers"), fields.value("attention_bias")
    window = fields.config.get("sliding_window")
    if window is not None:  # which the cache of transformers would take for the length of a chunk
        raise fields.error("sliding_window", window, f"layers of this family have {CHUNK}", "remove sliding_window")
    turned = _turned(fields)
    return shared_fields(
        fields, qkv_bias=bias, out_bias=bias, turned=turned, experts=_experts_of_layers(fields),
        turned_norm=fields.value("use_qk_norm") and any(turned), intermediate=fields.size("intermediate_size_mlp"),
        limits=(*_chunks(fields, turned), *_growth(fields, turned)), windows=[None] * layers,
    )  # fmt: skip


def _turned(fields: Fields) -> list[bool]:
    """Return whether each layer has the rotary embedding; an empty list is none."""
    given = {key: value for key, value in fields.config.items() if key != "no_rope_layers" or value != []}
    return turned_layers(replace(fields, config=given))


def _experts_of_layers(fields: Fields) -> list[Experts | None]:
    """Return the experts of each layer; None where it has a feed-forward network."""
    experts = replace(
        read_experts(fields, "intermediate_size", "num_local_experts", among=False),
        by_input=True, shared=fields.size("intermediate_size"), shared_gate=False, inputs_first=True,
    )  # fmt: skip
    layers, given = range(fields.size("num_hidden_layers")), fields.value("moe_layers")
    step = fields.size("interleave_moe_layer_step")
    chosen = layers[step - 1 :: step] if given is None else given
    return [experts if layer in chosen else None for layer in layers]


def _chunks(fields: Fields, turned: list[bool]) -> tuple[Limit, ...]:
    """Return the length of a chunk, if some layer attends within chunks."""
    size = fields.optional_size(CHUNK)
    types = layer_types(fields, tuple(CHUNKED if turns and size else FULL for turns in turned), (FULL, CHUNKED)) or ()
    if CHUNKED in types and size is None:
        raise fields.error(CHUNK, None, f"layer_types has {CHUNKED}", "set it, or use full_attention")
    return (Limit(CHUNK, size),) if size is not None and CHUNKED in types else ()


def _growth(fields: Fields, turned: list[bool]) -> tuple[Limit, ...]:
    """Return the length up to which queries are not scaled, unless they never are; the last position counts from 1."""
    floor, grows = fields.size(FLOOR), fields.value("attn_temperature_tuning") and fields.value("attn_scale") != 0
    return (Limit(FLOOR, floor - 1),) if grows and not all(turned) else ()
