"""A new DFlash draft: its config in the form of speculators, and the settings of its training. Trains nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from pipeline.distill.head import KEPT, rope_fields, size_fields
from pipeline.distill.train import TrainingSettings
from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import fitted, read_config
from pipeline.models.eagle3_writers import CREATED_BY, TANDEM
from pipeline.sources.checkpoint import Checkpoint

BLOCK = 8
"""Positions of a block: the newest token and seven masks, which are the draft tokens of the largest step."""

DECAY = 4.0
"""The loss of draft token k weighs exp(-(k - 1) / DECAY): the paper's value for blocks of 8 (arXiv 2602.06036)."""

ANCHORS = 64
"""Blocks of a sequence in a training step: a sixth of the longest sequence, as 512 of 3,072 in the paper."""


def hub_name(source: str) -> str | None:
    """Return the Hub repository of a target, as a draft's config names its verifier; None for another source."""
    return source.removeprefix("hf://").partition("@")[0] if source.startswith("hf://") else None


def block_config(
    target: Checkpoint, draft_vocab: int, taps: tuple[int, ...], layers: int, verifier: str | None
) -> dict[str, Any]:  # fmt: skip
    """Return the `config.json` of a DFlash draft in the form of speculators, with `layers` layers.

    The mask token is the target's last one. Fields that readers default differently are all written. No layer has a
    window; with `sliding_window_non_causal: false` vLLM 0.32 makes every layer causal all the same.
    """
    steps = [{"proposal_type": "greedy", "speculative_tokens": BLOCK - 1}]
    names = target.config_json.get("architectures") or []
    return {
        "architectures": ["DFlashDraftModel"],
        CREATED_BY: TANDEM,
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dflash", "default_proposal_method": "greedy", "proposal_methods": steps,
            "verifier": {"name_or_path": verifier, "architectures": names},
        },
        "aux_hidden_state_layer_ids": list(taps),
        "block_size": BLOCK,
        "draft_vocab_size": draft_vocab,
        "mask_token_id": target.config.vocab - 1,
        "sample_from_anchor": False,
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "model_type": "qwen3",
            **{key: target.config_json[key] for key in KEPT if key in target.config_json},
            **rope_fields(target),
            **size_fields(target.config),
            "num_hidden_layers": layers,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    }  # fmt: skip


def read_block(config_json: dict[str, Any], target: Checkpoint) -> ModelConfig:
    """Return the config of a new draft, whose layers are Qwen3's: with norms of queries and keys."""
    read = fitted(target.config, read_config(config_json, "draft"), "draft")
    return replace(read, qk_norm="head")


def block_training(training: TrainingSettings) -> TrainingSettings:
    """Return the settings of a DFlash training: all masks of a block from the first step, at random positions."""
    weight = math.exp(-1 / DECAY)
    return replace(training, single=0.0, depths=BLOCK - 1, depth_weight=weight, anchors=ANCHORS)
