"""Compare how Tandem and transformers read a `config.json`, before anything is compiled from it. Reads no weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SourceError, TandemError, reason
from pipeline.files.atomic import disk_errors
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import rotary_frequencies
from pipeline.models.fields import shown
from pipeline.models.rope import in_both_layouts
from pipeline.sources.checkpoint import Checkpoint

TOLERANCE = 1e-4
"""Relative difference of rotary frequencies: theta to a power, computed in float32 in two ways."""

FIRST_WITH_ROPE_PARAMETERS = 5
"""Major version of transformers."""

Reading = dict[str, Any]
"""Values that decide a model's output, by name."""


def check_reading(checkpoint: Checkpoint) -> None:
    """Raise an error if transformers reads a checkpoint's config otherwise than Tandem.

    Raises:
        SourceError: every field that differs, with both values, or the reason why transformers rejects the config.

    """
    if checkpoint.layers is not None or not checkpoint.config.draft_kind.in_transformers:
        return  # no config of its own, or none of a class of transformers
    where, version = str(checkpoint.root / "config.json"), f"transformers {transformers.__version__}"
    try:
        named = readable(checkpoint.config_json, checkpoint.config.max_position)
        differences = "; ".join(dict.fromkeys(filter(None, (difference(checkpoint.config, c) for c in named))))
    except TandemError:
        raise
    except Exception as error:  # whatever its classes raise
        what = f"{version} rejects this config: {_last_line(error)}"
        raise SourceError(what, where=where, fix="correct the field in config.json") from error
    if differences:
        what = f"Tandem and {version} read this config differently: {differences}"
        raise SourceError(what, where=where, fix="report this as a bug of Tandem, with this config.json")


def difference(config: ModelConfig, config_json: Mapping[str, Any]) -> str:
    """Return the fields that Tandem and transformers read differently, with both values; empty if there are none."""
    ours, theirs = here(config), by_transformers(config_json)
    differing = [key for key in ours if not _equal(ours[key], theirs[key])]
    return "; ".join(f"{key}: {_text(ours[key])}, transformers: {_text(theirs[key])}" for key in differing)


def readable(config_json: Mapping[str, Any], max_position: int) -> list[Mapping[str, Any]]:
    """Return the source's config, if the installed transformers knows its layout, and the config of the artifact."""
    packed = in_both_layouts(config_json, max_position)
    known = int(transformers.__version__.split(".")[0]) >= FIRST_WITH_ROPE_PARAMETERS
    return [config_json, packed] if known else [packed]


def here(config: ModelConfig) -> Reading:
    """Return what Tandem reads."""
    return {
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "biases of q, k, v": config.qkv_bias,
        "bias of o": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "norms of q and k": config.qk_norm,
        "rms_norm_eps": config.norm_eps,
        "hidden_act at 1": float(functional.silu(torch.ones(()))),
        "scale of attention": config.head_dim**-0.5,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
        "sliding_window": config.window,
        "scale of rotary embeddings": 1.0,
        "rotary frequencies": rotary_frequencies(config, torch.device("cpu")),
    }


def by_transformers(config_json: Mapping[str, Any]) -> Reading:
    """Return what transformers makes of a config: the properties of the model that it builds, without memory."""
    config = _loaded(config_json)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).model
    attention, mlp, embedding = model.layers[0].self_attn, model.layers[0].mlp, model.embed_tokens
    rotary = type(model.rotary_emb)(config)
    return {
        "num_hidden_layers": len(model.layers),
        "vocab_size": embedding.num_embeddings,
        "hidden_size": embedding.embedding_dim,
        "intermediate_size": mlp.gate_proj.out_features,
        "head_dim": attention.head_dim,
        "num_attention_heads": attention.q_proj.out_features // attention.head_dim,
        "num_key_value_heads": attention.k_proj.out_features // attention.head_dim,
        "biases of q, k, v": attention.q_proj.bias is not None,
        "bias of o": attention.o_proj.bias is not None,
        "mlp_bias": mlp.gate_proj.bias is not None,
        "norms of q and k": hasattr(attention, "q_norm"),
        "rms_norm_eps": model.norm.variance_epsilon,
        "hidden_act at 1": float(mlp.act_fn(torch.ones(()))),
        "scale of attention": attention.scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": _window(config),
        "scale of rotary embeddings": rotary.attention_scaling,
        "rotary frequencies": rotary.inv_freq,
    }


def _loaded(config_json: Mapping[str, Any]) -> Any:
    """Return the config that transformers reads from a folder: it chooses the class by more than `model_type`."""
    with tempfile.TemporaryDirectory(prefix="tandem-config-") as folder, disk_errors(Path(folder)):
        (Path(folder) / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _window(config: Any) -> int | None:
    """Return the sliding window of the KV cache that transformers builds; None if no layer has one."""
    layers = transformers.DynamicCache(config=config).layers
    windows = {vars(layer)["sliding_window"] for layer in layers if "sliding_window" in vars(layer)}
    return min(windows, default=None)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours, theirs.float(), rtol=TOLERANCE, atol=0)
    return bool(ours == theirs)


def _text(value: Any) -> str:
    """Return a value for an error; of a tensor, its length and its last value."""
    return f"{len(value)} values, the last {float(value[-1]):.6g}" if isinstance(value, Tensor) else shown(value)


def _last_line(error: Exception) -> str:
    """Return the line of an exception that names the field: classes of transformers 5 put a heading above."""
    if isinstance(error, KeyError) or not str(error).strip():
        return reason(error)
    return str(error).strip().splitlines()[-1].strip().removeprefix("TypeError: ").removeprefix("ValueError: ")
