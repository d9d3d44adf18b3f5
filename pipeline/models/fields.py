"""Read the fields of a Hugging Face `config.json` that all families share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.config import Llama3Rope, ModelConfig


def shared_fields(config: Mapping[str, Any], where: str, **family: Any) -> ModelConfig:
    """Return a `ModelConfig` of the fields that all families share; `family` adds or overrides fields.

    Raises:
        SourceError: a missing size, or a field whose value changes the computation in an unsupported way.

    """
    _reject_unsupported(config, where)
    hidden = _size(config, "hidden_size", where)
    heads = _size(config, "num_attention_heads", where)
    theta, scaling, linear = _rope(config, where)
    common: dict[str, Any] = {
        "family": config["model_type"],
        "layers": _size(config, "num_hidden_layers", where),
        "hidden": hidden,
        "intermediate": _size(config, "intermediate_size", where),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocab": _size(config, "vocab_size", where),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_linear_factor": linear,
        "max_position": int(config.get("max_position_embeddings", 2048)),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "draft_vocab": config.get("draft_vocab_size"),
        "shares_embedding": bool(config.get("shares_embedding", False)),
        "eos_ids": _ids(config.get("eos_token_id")),
        "window": _window(config, where),
    }
    return _checked(ModelConfig(**(common | family)), where)


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    if config.heads % config.kv_heads:
        raise SourceError(
            f"num_key_value_heads={config.kv_heads} does not divide num_attention_heads={config.heads}", where=where
        )
    if config.head_dim % 2:
        raise SourceError(f"head_dim={config.head_dim} is odd; rotary embedding needs pairs", where=where)
    return config


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise SourceError(f"{key}={value!r} is not a positive integer", where=where, fix="repair config.json")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _reject_unsupported(config: Mapping[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise SourceError(f"hidden_act={activation!r} is not supported", where=where, fix="use a model with silu")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise SourceError(f"{key} is set: quantised checkpoints are not supported", where=where)
    partial = config.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1.0):
        raise SourceError(f"partial_rotary_factor={partial} is not supported", where=where)
    if config.get("pretraining_tp", 1) not in (None, 1):
        raise SourceError(f"pretraining_tp={config['pretraining_tp']} is not supported", where=where)


def _window(config: Mapping[str, Any], where: str) -> int | None:
    """Return the sliding window if any layer has one; reject other kinds of layers."""
    types = set(config.get("layer_types") or ())
    unknown = sorted(types - {"full_attention", "sliding_attention"})
    if unknown:
        raise SourceError(f"layer_types={unknown} is not supported", where=where, fix="use full or sliding attention")
    by_default = config["model_type"] == "mistral"
    active = "sliding_attention" in types if types else config.get("use_sliding_window", by_default)
    return _size(config, "sliding_window", where) if active and config.get("sliding_window") else None


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None, float]:
    """Return theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None, 1.0
    if kind == "linear":
        return theta, None, float(scaling["factor"])
    if kind == "llama3":
        return theta, _llama3(scaling), 1.0
    raise SourceError(f"rope type {kind!r} is not supported", where=where, fix="supported: default, linear, llama3")


def _llama3(scaling: Mapping[str, Any]) -> Llama3Rope:
    return Llama3Rope(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position=int(scaling["original_max_position_embeddings"]),
    )
