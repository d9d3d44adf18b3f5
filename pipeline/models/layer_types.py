"""The sliding window of each layer, by `layer_types` and the older fields that stand for them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.models.config import Limit, ModelConfig
from pipeline.models.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
PER_LAYER = "per_layer_config"
"""Sizes of layers of Gemma 4 that differ from the model's, by the number of the layer."""

MOE_LAYERS = {"moe_layers", "interleave_moe_layer_step"}
"""Fields of Llama 4 that say which layers have experts."""

SHARED_LAYERS = "num_kv_shared_layers"
"""Number of last layers of Gemma 4 that share keys and values."""

LAYER_TYPES = (FULL, SLIDING)
OLDER = "layers_block_type"
"""Another name of `layer_types` in Granite 4."""
LINEAR = "linear_attention"
CHUNKED, CHUNK = "chunked_attention", "attention_chunk_size"
"""The type of layers that attend within chunks, and the field of the chunks' length."""


def windows(fields: Fields, default: tuple[str, ...] | None = None) -> list[int | None]:
    """Return the sliding window of each layer; `default` are the types of layers without the field.

    Raises:
        SourceError: other types of layers, or layers with a window that is not set.

    """
    types, size = layer_types(fields, default), _size(fields)
    if types is None:
        full = fields.value("max_window_layers") if fields.has("max_window_layers") else 0
        return [size if layer >= full else None for layer in range(fields.size("num_hidden_layers"))]
    if SLIDING in types and size is None:
        used = " and use_sliding_window true" if fields.has("use_sliding_window") else ""
        raise fields.error("layer_types", types, "no sliding window is set", f"set sliding_window{used}")
    return [size if kind == SLIDING else None for kind in types]


def layer_types(
    fields: Fields, default: tuple[str, ...] | None = None, known: tuple[str, str] = LAYER_TYPES
) -> list[str] | None:  # fmt: skip
    """Return the type of each layer, one of `known`; None if neither the field nor a default says so.

    Raises:
        SourceError: other types of layers, or another number of them.

    """
    given: list[str] | None = fields.value("layer_types")
    types = given if given is not None or default is None else list(default)
    if types is None:
        return None
    if unknown := sorted(set(types) - set(known)):
        raise fields.error("layer_types", unknown, "not supported", f"use layers of {' or '.join(known)}")
    layers = fields.size("num_hidden_layers")
    if len(types) != layers:
        raise fields.error("layer_types", types, f"{len(types)} layers, but num_hidden_layers={layers}")
    return types


def linear_layers(fields: Fields) -> list[str]:
    """Return the type of each layer of a family with linear attention: in most, unless `layer_types` says so.

    Raises:
        SourceError: as `layer_types`.

    """
    if fields.value("layer_types") is None:
        interval, layers = fields.size("full_attention_interval"), fields.size("num_hidden_layers")
        return [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    return layer_types(fields, known=(FULL, LINEAR)) or []


def every(count: int, layers: int) -> tuple[str, ...]:
    """Return types of layers of which each `count`-th one attends to all keys, the others within the window."""
    return tuple(SLIDING if (layer + 1) % count else FULL for layer in range(layers))


def of_layers(config: ModelConfig, config_json: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Return the fields by which a config describes a model of some layers of its own, in their order.

    Lists by layer replace rules by the number of a layer, which the new model's layers do not follow.
    """
    kinds = [config.layer(layer) for layer in layers]
    fields: dict[str, Any] = {"num_hidden_layers": len(layers)}
    types = [LINEAR if kind.delta_net else SLIDING if kind.window else FULL for kind in kinds]
    mixed = len({(kind.window, kind.delta_net) for kind in config.kinds}) > 1
    if isinstance(config_json.get("layer_types"), list) or mixed:
        fields["layer_types"] = types
    if OLDER in config_json:
        fields[OLDER] = types
    if SHARED_LAYERS in config_json:
        fields[SHARED_LAYERS] = sum(kind.shares_keys for kind in kinds)
    own = config_json.get(PER_LAYER)
    if isinstance(own, Mapping) and own:
        fields[PER_LAYER] = {str(new): own[str(old)] for new, old in enumerate(layers) if str(old) in own}
    if any(kind.rope is None and kind.delta_net is None for kind in config.kinds):
        fields["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    if any(kind.experts is None for kind in config.kinds) and any(kind.experts for kind in config.kinds):
        fields["mlp_only_layers"] = [layer for layer, kind in enumerate(kinds) if kind.experts is None]
        fields["decoder_sparse_step"] = 1
        if MOE_LAYERS & config_json.keys():
            fields["moe_layers"] = [layer for layer, kind in enumerate(kinds) if kind.experts is not None]
    return fields


def cache_limit(fields: Fields) -> tuple[Limit, ...]:
    """Return the window that transformers' KV cache has though the family's attention has none, as a limit.

    Decode then sees the last tokens alone, but a prompt is read as a whole: results depend on how a text is split.
    """
    sizes = [size for size in windows(fields) if size is not None]
    return (Limit("sliding_window", min(sizes)),) if sizes else ()


def _size(fields: Fields) -> int | None:
    if fields.has("use_sliding_window") and not fields.value("use_sliding_window"):
        fields.value("sliding_window")  # of its type; Qwen2-MoE writes 0 for a window that is not used
        return None
    return fields.optional_size("sliding_window")
