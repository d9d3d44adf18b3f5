"""A new draft: its config, its vocabulary, and its initial weights, from its target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import TAPPED, read_config
from pipeline.models.weights import D2T, EMBEDDING, HEAD, NORM, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights

EMBEDDING_SCALE = 0.02
"""Scale of the initial weights with which the new layer reads a token's embedding."""

KEPT = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def head_config(target: Checkpoint, draft_vocab: int, taps: tuple[int, ...]) -> dict[str, Any]:
    """Return the `config.json` of a head of the target's sizes, in the public convention."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{key: target.config_json[key] for key in KEPT if key in target.config_json},
        **_sizes(target.config),
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab,
        "eagle_config": {TAPPED: list(taps)},
    }


def _sizes(target: ModelConfig) -> dict[str, Any]:
    """Return the target's sizes as fields of a config: the defaults of its family are not those of the head's."""
    return {
        "hidden_size": target.hidden,
        "intermediate_size": target.intermediate,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "vocab_size": target.vocab,
        "rms_norm_eps": target.norm_eps,
        "max_position_embeddings": target.max_position,
    }


def model_config(target: Checkpoint, draft_vocab: int, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return the `config.json` of a draft model of some of the target's layers, with the target's embedding."""
    fields = {
        key: value for key, value in target.config_json.items() if key not in ("layer_types", "transformers_version")
    }
    return fields | {
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab,
    }


def layers_of(target: Checkpoint, config: ModelConfig, layers: tuple[int, ...], ids_V: Tensor) -> dict[str, Tensor]:
    """Return a draft model's initial weights, float32: chosen layers, the target's norm, rows of its head."""
    refs = weights(target)
    start: dict[str, Tensor] = {}
    for spec in weight_specs(config):
        if spec.name in (EMBEDDING, D2T):
            continue
        if spec.name == HEAD:
            start[spec.name] = read_tensor(refs[EMBEDDING if target.config.tied else HEAD]).float()[ids_V]
            continue
        name = spec.name
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            name = f"model.layers.{layers[int(number)]}.{rest}"
        start[spec.name] = read_tensor(refs[name]).float()
    return start


def frequent(tokens: Iterable[Tensor], size: int, always: Iterable[int]) -> Tensor:
    """Return the ids of a reduced vocabulary, ascending int64: `always`, and the most frequent of `tokens`."""
    counts: Counter[int] = Counter()
    for sequence_T in tokens:
        counts.update(sequence_T.tolist())
    first = list(dict.fromkeys(always))
    ids = first + [token for token, _ in counts.most_common() if token not in set(first)]
    spare = (token for token in range(1 << 30) if token not in counts and token not in first)
    while len(ids) < size:
        ids.append(next(spare))
    return torch.tensor(sorted(ids[:size]))


def initial(target: Checkpoint, config_json: dict[str, Any], ids_V: Tensor, seed: int) -> dict[str, Tensor]:
    """Return a head's initial weights, float32: the target's last layer over its highest features, norm, head rows."""
    config = read_config(config_json, "head")
    refs = weights(target)
    generator = torch.Generator().manual_seed(seed)
    last = f"model.layers.{target.config.layers - 1}."
    start: dict[str, Tensor] = {}
    for spec in weight_specs(config):
        name = spec.name.replace("model.layers.0.", last)
        if spec.name in (EMBEDDING, D2T):
            continue
        if spec.name == HEAD:
            start[spec.name] = read_tensor(refs[EMBEDDING if target.config.tied else HEAD]).float()[ids_V]
        elif spec.name == NORM:
            start[spec.name] = read_tensor(refs[NORM]).float()
        elif spec.name == "fc.weight":
            start[spec.name] = torch.randn(spec.shape, generator=generator) * EMBEDDING_SCALE * spec.shape[1] ** -0.5
            start[spec.name][:, -config.hidden :] += torch.eye(config.hidden)
        elif spec.name.endswith("hidden_norm.weight"):
            start[spec.name] = read_tensor(refs[f"{last}input_layernorm.weight"]).float()
        elif spec.name.endswith("input_layernorm.weight"):
            start[spec.name] = torch.ones(spec.shape)
        elif spec.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tokens = torch.randn(spec.shape[0], config.hidden, generator=generator) * EMBEDDING_SCALE
            start[spec.name] = torch.cat((tokens, read_tensor(refs[name]).float()), dim=1)
        else:
            start[spec.name] = read_tensor(refs[name]).float()
    return start


def public_name(name: str) -> str:
    """Return a weight's name in the files of public heads."""
    return name.replace("model.layers.0.", "midlayer.").replace("model.norm.", "norm.")
