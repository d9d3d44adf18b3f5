"""The layer of an EAGLE-3 head: a draft over the target's hidden states (Li et al. 2025, arXiv 2503.01840).

At position i the head reads the token at i + 1 and the target's features at i, and predicts the token at i + 2. Where
the target has not been yet, its own output stands in for the features. Pure functions.

Shapes: B rows, T tokens, H hidden, X features (three of the target's hidden sizes side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import (
    Weights,
    attention,
    embed,
    layer_weights,
    mlp,
    rms_norm,
    rotary_of,
    store,
)
from pipeline.models.parallel import Caches, Seams
from pipeline.models.weights import NORM


def features(config: ModelConfig, weights: Weights, seams: Seams, taps_BTX: Tensor) -> Tensor:
    """The target's hidden states as the head's layer takes them: [B, T, X] -> [B, T, H]."""
    return seams.linear(taps_BTX, weights["fc.weight"], config.hidden)


def remember(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor,
    positions_BT: Tensor, caches: Caches,
) -> None:  # fmt: skip
    """Only write keys and values, for positions whose prediction nobody needs: a tenth of the layer's weights."""
    w = layer_weights(weights, 0)
    inputs, _ = inputs_of(config, weights, seams, tokens_BT, features_BTH)
    store(config, w, seams, inputs, rotary_of(config, positions_BT, inputs.dtype), 0, caches)


def hidden_states(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor,
    positions_BT: Tensor, caches: Caches,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the layer; returns what the LM head reads and what stands in for the next position's features, [B, T, H]."""
    w = layer_weights(weights, 0)
    inputs, residual = inputs_of(config, weights, seams, tokens_BT, features_BTH)
    rotary = rotary_of(config, positions_BT, inputs.dtype)
    x = residual + attention(config, w, seams, inputs, rotary, 0, caches)
    x = x + mlp(config, w, seams, rms_norm(x, w["post_attention_layernorm.weight"], config.norm_eps))
    return rms_norm(x, weights[NORM], config.norm_eps), x


def inputs_of(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor
) -> tuple[Tensor, Tensor]:
    """What q, k and v read, [B, T, 2 H], and the residual stream [B, T, H]."""
    w = layer_weights(weights, 0)
    tokens = rms_norm(embed(config, weights, seams, tokens_BT), w["input_layernorm.weight"], config.norm_eps)
    normed = rms_norm(features_BTH, w["hidden_norm.weight"], config.norm_eps)
    residual = normed if config.eagle3 is not None and config.eagle3.norm_before_residual else features_BTH
    return torch.cat((tokens, normed), dim=-1), residual
