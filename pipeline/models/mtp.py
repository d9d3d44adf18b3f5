"""MTP modules inside a target (`mtp.*` of Qwen3-Next and Qwen3.5), as drafts over the target's output.

At position i a module reads the token at i + 1 beside the target's output after its last norm at i, as an EAGLE-3 head
does (`models.eagle3_layer`). Both are normalised and joined by `fc`; a layer of the target's family with full attention
follows, and a norm of its own, whose output takes the place of the target's at the next position. Embedding and LM head
are the target's. Source: vLLM 0.32, modules `qwen3_next_mtp` and `qwen3_5_mtp`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.config import Eagle3, ModelConfig
from pipeline.models.layer_types import FULL

MARK = "tandem_mtp"
"""Field of the config of a derived draft that is the target's module."""

PREFIX = "mtp."
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Fields with the number of a target's modules; without them it has one."""


def is_module(config_json: Mapping[str, Any]) -> bool:
    """Return whether a config is that of a module."""
    return config_json.get(MARK) is True


def is_stated(config_json: Mapping[str, Any]) -> bool:
    """Return whether the config of a target states one module that is read."""
    return config_json.get("model_type") in FAMILIES and any(config_json.get(name) == 1 for name in COUNTS)


def of_target(config_json: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config of the module inside a target.

    Raises:
        SourceError: a target of a family whose modules are not read, or with several of them.

    """
    family = config_json.get("model_type")
    if family not in FAMILIES:
        what = f"MTP modules of model_type {family!r} are not supported"
        raise SourceError(what, where=where, fix=f"use a target of {', '.join(FAMILIES)}, or another draft")
    for name in COUNTS:
        count = config_json.get(name, 1)
        if count != 1:
            what = f"{name}={count!r} is not supported: one module is read"
            raise SourceError(what, where=where, fix="use another draft")
    return {**config_json, "num_hidden_layers": 1, "layer_types": [FULL], "shares_embedding": True, MARK: True}


def of_layer(config: ModelConfig) -> ModelConfig:
    """Return the module whose layer a config describes."""
    head = Eagle3(config.hidden, writer="mtp", tap_count=1, reads_output=True, hidden_norm=False, norm_output=True)
    return replace(config, tied=False, shares_embedding=True, shares_head=True, eagle3=replace(head, mtp=True))


def tensor_name(name: str) -> str | None:
    """Return the name that models use for a tensor of a module; None for other tensors of the target."""
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    return f"model.{rest}" if rest.startswith(("layers.", "norm.")) else rest
