"""A new draft: its config, its vocabulary, and its initial weights, from its target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import TENSORS
from pipeline.models.eagle3_writers import (
    ANGELSLIM_TAPPED,
    CAPTURED,
    CREATED_BY,
    NESTED,
    OPTIONS,
    RECIPE,
    SWITCHES,
    TANDEM,
    TAPPED,
    usual_taps,
)
from pipeline.models.layer_types import of_layers
from pipeline.models.p_eagle import MASK_FIELDS
from pipeline.models.quantisation import without_quantisation
from pipeline.models.rope import RopeRules, rules_of
from pipeline.models.weights import D2T, EMBEDDING, FC, HEAD, MASK_HIDDEN, NORM, WeightSpec, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.packed import Source
from pipeline.sources.values import read_tensor, read_weight
from pipeline.sources.weights import weights

EMBEDDING_SCALE = 0.02
"""Scale of the initial weights with which the new layer reads a token's embedding."""

FIRST = "model.layers.0."
LAYER_OUTPUTS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
"""Endings of the weights by which a layer adds to the residual stream."""
DROPPED = (
    "shares_embedding", "speculators_config", "speculators_model_type", "speculators_version", ANGELSLIM_TAPPED,
    CAPTURED, NESTED, OPTIONS, RECIPE, TAPPED, TENSORS, *MASK_FIELDS,
)  # fmt: skip
"""Fields of a head that is trained further: notes of its opening, and fields that the new config writes itself."""

KEPT = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def head_config(target: Checkpoint, draft_vocab: int, taps: tuple[int, ...]) -> dict[str, Any]:
    """Return the `config.json` of a head of the target's sizes, as vLLM, SGLang and speculators read it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        CREATED_BY: TANDEM,
        **{key: target.config_json[key] for key in KEPT if key in target.config_json},
        **rope_fields(target),
        **size_fields(target.config),
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab,
        **_tapped(target.config, taps),
    }


def parallel_config(target: Checkpoint, draft_vocab: int, taps: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Return the `config.json` of a P-EAGLE head, as vLLM reads it with `parallel_drafting`.

    The mask token is the target's last one: the head knows masks by `mask_hidden`, not by their token.
    """
    return head_config(target, draft_vocab, taps) | parallel_fields(target, layers)


def parallel_fields(target: Checkpoint, layers: int) -> dict[str, Any]:
    """Return the fields of a P-EAGLE head of `layers` layers that an EAGLE-3 head does not have."""
    return {"ptd_token_id": target.config.vocab - 1, "num_hidden_layers": layers}


def continued_config(target: Checkpoint, start: Checkpoint, draft_vocab: int) -> dict[str, Any]:
    """Return the `config.json` of a head that another one was trained further to: its own, with every switch named."""
    head = start.config.eagle3
    assert head is not None
    stored = without_quantisation(start.config_json)
    own = {key: value for key, value in stored.items() if key not in (*DROPPED, *SWITCHES)}
    switches = {name: True for name in SWITCHES if vars(head)[name]}
    kind = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", CREATED_BY: TANDEM}
    taps = {OPTIONS: {"use_aux_hidden_state": False}} if head.reads_output else _tapped(target.config, head.taps)
    sizes = {"head_dim": start.config.head_dim, "draft_vocab_size": draft_vocab, "tie_word_embeddings": False}
    if head.mask_token is not None:
        sizes["ptd_token_id"] = head.mask_token
    return own | kind | sizes | switches | taps


def _tapped(target: ModelConfig, taps: tuple[int, ...]) -> dict[str, Any]:
    """Return the fields that list tapped layers: none for the usual ones, which every reader takes alike.

    At the top level vLLM and speculators read inputs of layers, in `eagle_config` SGLang reads outputs.
    """
    if taps == usual_taps(target.layers):
        return {}
    if taps[0] == 0:  # no layer's output: SGLang cannot read the embedding's
        return {TAPPED: list(taps)}
    return {TAPPED: list(taps), OPTIONS: {"use_aux_hidden_state": True, TAPPED: [tap - 1 for tap in taps]}}


def rope_fields(target: Checkpoint) -> dict[str, Any]:
    """Return the rotary embedding of a head, if its family reads the target's fields otherwise: its theta alone."""
    rules, kinds = rules_of(target.config_json.get("model_type")), target.config.kinds
    if rules == RopeRules():
        return {}
    theta = next((kind.rope.theta for kind in reversed(kinds) if kind.rope is not None), rules.theta)
    return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": None}


def size_fields(target: ModelConfig) -> dict[str, Any]:
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
    own = without_quantisation(target.config_json)
    fields = {key: value for key, value in own.items() if key != "transformers_version"}
    return {
        **fields,
        **of_layers(target.config, target.config_json, layers),
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
        start[spec.name] = read_weight(refs, replace(spec, name=name)).float()
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


def initial(
    target: Checkpoint, config: ModelConfig, ids_V: Tensor, seed: int, layers: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Return a head's initial weights, float32: the target's last layer over its highest features, norm, head rows.

    `layers` are the target's layers that the layers of a P-EAGLE head or a DFlash draft start from.
    """
    sources = layers or (target.config.layers - 1,) * config.layers
    start = _Start(target, config, ids_V, weights(target), sources, torch.Generator().manual_seed(seed))
    return {spec.name: start.weight(spec) for spec in weight_specs(config) if spec.name not in (EMBEDDING, D2T)}


@dataclass(frozen=True)
class _Start:
    """What initial weights are made from: the target, the rows of its head, and the layers to start from."""

    target: Checkpoint
    config: ModelConfig
    ids_V: Tensor
    refs: Mapping[str, Source]
    sources: tuple[int, ...]
    generator: torch.Generator

    def weight(self, spec: WeightSpec) -> Tensor:
        """Return one weight, float32 in the shape of its spec."""
        if spec.name == MASK_HIDDEN:
            return self._random(spec.shape)
        if spec.name == HEAD:
            return self._read(EMBEDDING if self.target.config.tied else HEAD)[self.ids_V]
        if spec.name == NORM:
            return self._read(NORM) + (self.target.config.norm_style == "offset")
        if spec.name == FC:
            projection = self._random(spec.shape) * EMBEDDING_SCALE * spec.shape[1] ** -0.5
            projection[:, -self.config.hidden :] += torch.eye(self.config.hidden)
            return projection
        return self._of_layer(spec)

    def _of_layer(self, spec: WeightSpec) -> Tensor:
        name, same_norms = _of_target(spec.name, self.sources), self.target.config.norms == self.config.norms
        is_block = self.config.draft_kind.blocks
        if spec.name.startswith("model.layers.") and (is_block or not spec.name.startswith(FIRST)):
            is_there = name in self.refs and same_norms and self.refs[name].shape == spec.shape
            return self._read(name) if is_there else self._of_kind(spec, name)
        if spec.name.endswith("hidden_norm.weight") and same_norms:
            return self._read(f"model.layers.{self.sources[0]}.input_layernorm.weight")
        if spec.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tokens = self._random((spec.shape[0], self.config.hidden)) * EMBEDDING_SCALE
            return torch.cat((tokens, self._read(name)), dim=1)
        return self._of_kind(spec, name)

    def _of_kind(self, spec: WeightSpec, name: str) -> Tensor:
        """Return a weight that has no source of its own: the target's of this name if it fits, else neutral values."""
        norms_differ = self.target.config.norms != self.config.norms
        if spec.name.endswith("input_layernorm.weight") or (spec.name.endswith("norm.weight") and norms_differ):
            return torch.ones(spec.shape)
        if name not in self.refs and len(spec.shape) == 1:  # a norm or bias that the target does not have
            return torch.ones(spec.shape) if spec.name.endswith(".weight") else torch.zeros(spec.shape)
        if name in self.refs and self.refs[name].shape == spec.shape:
            return self._read(name)
        return self._random(spec.shape) * spec.shape[-1] ** -0.5  # of a target with experts in this place

    def _read(self, name: str) -> Tensor:
        return read_tensor(self.refs[name]).float()

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator)


def parallel_start(head: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a P-EAGLE head's initial weights from a trained EAGLE-3 head: its first draft token is that head's.

    `new` are initial weights from the target (`initial`). Each layer after the first starts with outputs of zero, so it
    changes nothing before it is trained (Goyal et al. 2017, section 5.1, does the same by the scale of a norm).
    """
    silent = {name: torch.zeros_like(tensor) for name, tensor in new.items() if name.endswith(LAYER_OUTPUTS)}
    whole = {**new, **silent, **head}
    return {name: whole[name] for name in new}


def _of_target(name: str, sources: tuple[int, ...]) -> str:
    """Return the name of the target's weight that a head's starts from."""
    if not name.startswith("model.layers."):
        return name
    _, _, number, rest = name.split(".", 3)
    return f"model.layers.{sources[int(number)]}.{rest}"


def public_name(name: str) -> str:
    """Return a weight's name in the files of public heads."""
    return name.replace(FIRST, "midlayer.").removeprefix("model.")


def block_name(name: str) -> str:
    """Return a weight's name in the files of DFlash drafts."""
    return name.removeprefix("model.")
