"""Compare how Tandem and transformers read a `config.json`, before anything is compiled from it. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.errors import HostError, SourceError, TandemError, reason
from pipeline.extras import error_of_another_torch
from pipeline.models.activations import activated
from pipeline.models.config import Layer, ModelConfig
from pipeline.models.fields import shown
from pipeline.models.layer_types import CHUNK, FULL, SLIDING
from pipeline.models.quantisation import without_quantisation
from pipeline.models.rope import in_both_layouts
from pipeline.models.rotary import rotary_frequencies
from pipeline.models.weights import AFTER_INPUT
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.their_reading import Reading, by_transformers, one_or_all, windows_read

TOLERANCE = 1e-4
"""Relative difference of rotary frequencies: theta to a power, computed in float32 in two ways."""

FIRST_WITH_ROPE_PARAMETERS = 5
"""Major version of transformers."""

AGAIN = "install the packages of Tandem in a new environment: python3 -m venv"


def check_reading(checkpoint: Checkpoint) -> None:
    """Raise an error if transformers reads a checkpoint's config otherwise than Tandem.

    Raises:
        SourceError: every field that differs, with both values, or the reason why transformers rejects the config.
        HostError: transformers cannot import its own classes in this environment.

    """
    if checkpoint.layers is not None or not checkpoint.config.draft_kind.in_transformers:
        return  # no config of its own, or none of a class of transformers
    where, version = str(checkpoint.root / "config.json"), f"transformers {transformers.__version__}"
    try:
        named = readable(checkpoint.config_json, checkpoint.config.max_position)
        differences = "; ".join(dict.fromkeys(filter(None, (difference(checkpoint.config, c) for c in named))))
    except TandemError:
        raise
    except ImportError as error:
        what = f"{version} cannot be imported: {_last_line(error)}"
        raise error_of_another_torch(version) or HostError(what, where="this environment", fix=AGAIN) from error
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
    config_json = without_quantisation(config_json)
    packed = in_both_layouts(config_json, max_position)
    known = int(transformers.__version__.split(".")[0]) >= FIRST_WITH_ROPE_PARAMETERS
    return [config_json, packed] if known else [packed]


def here(config: ModelConfig) -> Reading:
    """Return what Tandem reads."""
    first = config.at(0)
    whole = {"head": first.head_dim, "vector": config.heads * first.head_dim, None: None}
    reading = {
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "inner size by layer": [_inner(config, config.layer(index)) for index in range(config.layers)],
        "experts": _experts(config),
        "shares of experts are normalised": _normalised(config),
        "experts beside a network": _beside(config),
        "biases of experts": any(kind.experts.bias for kind in config.kinds if kind.experts),
        "bounds of SwiGLU": _bounds(config),
        "head_dim": first.head_dim,
        "num_attention_heads": config.heads,
        "biases of q, k, v": config.qkv_bias,
        "bias of o": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "sinks": config.sinks,
        "norm of q": whole[config.qk_norm],
        "norm of turned q": config.turned_norm,
        "shared expert": _shared(config),
        "attention_chunk_size": next((one.length for one in config.limits if one.field == CHUNK), None),
        "norms of a layer": sorted(filter(None, (*vars(config.norms).values(), config.layer_input and AFTER_INPUT))),
        "rms_norm_eps": config.norm_eps,
        "activation at 1": None if _bounds(config) else float(activated(config.activation, torch.ones(()))),
        "scale of attention": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "scale of embeddings": config.embedding_scale,
        "scale of residuals": config.residual_scale,
        "scale of logits": config.logit_scale,
        "cap of scores": config.attention_cap,
        "cap of logits": config.logit_cap,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
        "layers with rotary embeddings": [config.layer(index).rope is not None for index in range(config.layers)],
    }
    reading |= _by_layer(config)
    reading |= {key: value for rope in _ropes(config) for key, value in rope.items()}
    limits = [limit.length for limit in config.limits if limit.field == "sliding_window"]
    windows = [config.layer(index).window for index in range(config.layers)]
    # Some layers of a family without windows have caches with one: the limit is that of all.
    return reading | {"sliding_window": min(limits)} if limits else reading | windows_read(windows)


def _by_layer(config: ModelConfig) -> Reading:
    """Return what differs by layer in attention, and what Gemma 4 does beside it."""
    nets = [config.layer(index).delta_net for index in range(config.layers)]
    with_attention = [index for index, net in enumerate(nets) if net is None]
    with_keys = [index for index in config.keeping if nets[index] is None]
    return {
        "head_dim by layer": [config.at(index).head_dim for index in with_attention],
        "num_key_value_heads": one_or_all([config.at(index).kv_heads for index in with_keys]),
        "values are keys": [config.layer(index).values_are_keys for index in with_keys],
        "layers of the keys": [config.keys_of(index) for index in range(config.layers)],
        "inputs of layers": config.layer_input,
        "values are normalised": config.v_norm,
        "output of layers is scaled": config.layer_scalar,
        "recurrent layers": [net is not None for net in nets],
        "heads of recurrent layers": _delta_net(config),
        "gate of attention": config.attention_gate,
    }


def _inner(config: ModelConfig, layer: Layer) -> int:
    if layer.experts is None or config.has_network(layer):
        return config.of(layer).intermediate
    return layer.experts.intermediate


def _beside(config: ModelConfig) -> int | None:
    """Return the inner size of experts that stand beside a feed-forward network; None without any."""
    sizes = [kind.experts.intermediate for kind in config.kinds if kind.experts and config.has_network(kind)]
    return sizes[0] if sizes else None


def _experts(config: ModelConfig) -> list[int] | None:
    """Return the number of experts and of those of a token; None without experts."""
    return next(([kind.experts.count, kind.experts.chosen] for kind in config.kinds if kind.experts), None)


def _normalised(config: ModelConfig) -> bool | None:
    """Return whether shares of experts have the sum 1; None without experts, or where shares are of inputs."""
    return next((kind.experts.among for kind in config.kinds if kind.experts and not kind.experts.by_input), None)


def _shared(config: ModelConfig) -> list[Any] | None:
    """Return the inner size of an expert of every token, and whether it has a gate; None without one."""
    of_kinds = (kind.experts for kind in config.kinds if kind.experts and kind.experts.shared)
    return next(([experts.shared, experts.shared_gate] for experts in of_kinds), None)


def _delta_net(config: ModelConfig) -> list[int] | None:
    """Return numbers and sizes of heads, and the kernel of the convolution; None without recurrent layers."""
    net = config.delta_net
    return None if net is None else [net.key_heads, net.value_heads, net.key_dim, net.value_dim, net.kernel]


def _bounds(config: ModelConfig) -> list[float] | None:
    """Return limit and alpha of a bounded SwiGLU; None without bounds."""
    clamps = [kind.experts.clamp for kind in config.kinds if kind.experts and kind.experts.clamp]
    return [clamps[0].limit, clamps[0].alpha] if clamps else None


def _ropes(config: ModelConfig) -> Iterator[Reading]:
    """Yield the rotary embeddings of layers with and without a window."""
    for kind in config.kinds:
        if kind.rope is not None:
            of = SLIDING if kind.window else FULL
            frequencies = rotary_frequencies(kind.rope, torch.device("cpu"))
            yield {f"scale of rotary embeddings, {of}": kind.rope.scale, f"rotary frequencies, {of}": frequencies}


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
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
