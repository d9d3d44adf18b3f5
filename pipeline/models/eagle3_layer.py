"""The layers of an EAGLE-3 head: a draft over the target's hidden states (Li et al. 2025, arXiv 2503.01840).

At position i the head reads the token at i + 1 and the target's features at i, and predicts the token at i + 2. At
positions that the target has not processed, the head's own output replaces the features. Further layers, which P-EAGLE
heads have, are a decoder's. Pure functions.

Shapes: B rows, T tokens, H hidden, X the target's states that the head reads, concatenated.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import (
    Stream,
    Weights,
    attend_of,
    attention,
    layer_weights,
    mlp,
    next_norm,
    run_layer,
    store,
)
from pipeline.models.norms import norm, rms_norm
from pipeline.models.parallel import Pass, Seams
from pipeline.models.rotary import rotary_of
from pipeline.models.vocabulary import embed
from pipeline.models.weights import FC, FC_NORM, FEATURE_NORM, INPUT_NORM, NORM, TOKEN_NORM


def features(config: ModelConfig, weights: Weights, seams: Seams, states_BTX: Tensor) -> Tensor:
    """Project the target's hidden states to the input of the head's layer: [B, T, X] -> [B, T, H]."""
    head = config.eagle3
    assert head is not None
    if head.reads_output:
        return states_BTX
    if head.norm_before_fc:
        states_BTX = rms_norm(states_BTX, weights[INPUT_NORM], config.norm_eps)
    if head.fc_norm:
        each_XH = torch.stack([weights[FC_NORM.format(tap)] for tap in range(head.tap_count)])
        split = states_BTX.unflatten(-1, (head.tap_count, head.target_hidden))
        states_BTX = rms_norm(split, each_XH, config.norm_eps).flatten(-2)
    return seams.linear(states_BTX, weights[FC], config.hidden)


def write_cache(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor, run: Pass
) -> None:
    """Write keys and values only, for positions without a prediction: of the last layer a tenth of the weights."""
    last = config.layers - 1
    seams = seams.of_live(run.live_BT)
    inputs, _ = inputs_of(config, weights, seams, tokens_BT, features_BTH)
    if last:
        x = first_layer(config, weights, seams, (tokens_BT, features_BTH), run)
        inputs = further_layers(config, weights, seams, x, run, (1, last)).normed_BTH
    own = run.of_layer(last)
    rotary = rotary_of(config, run.positions_BT, inputs.dtype)
    store(config, layer_weights(weights, last), seams, inputs, rotary, own)
    run.keep(last, own.state)


def hidden_states(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor, run: Pass
) -> tuple[Tensor, Tensor]:
    """Run the layers; return the LM head's input and what replaces the next position's features, both [B, T, H]."""
    seams = seams.of_live(run.live_BT)
    x = first_layer(config, weights, seams, (tokens_BT, features_BTH), run)
    if config.layers > 1:
        x = further_layers(config, weights, seams, x, run, (1, config.layers)).x_BTH
    return outputs_of(config, weights, x)


def first_layer(
    config: ModelConfig, weights: Weights, seams: Seams, read: tuple[Tensor, Tensor], run: Pass
) -> Tensor:  # fmt: skip
    """Run the layer that reads tokens [B, T] and features [B, T, H]: [B, T, H]."""
    w = layer_weights(weights, 0)
    inputs, residual = inputs_of(config, weights, seams, *read)
    assert config.eagle3 is not None
    if config.eagle3.mtp:
        return further_layers(config, weights, seams, residual, run, (0, 1)).x_BTH
    rotary = rotary_of(config, run.positions_BT, inputs.dtype)
    own = run.of_layer(0)
    x = residual + attention(config, w, seams, inputs, rotary, own)
    run.keep(0, own.state)
    return x + mlp(config, w, seams, rms_norm(x, w["post_attention_layernorm.weight"], config.norm_eps))


def further_layers(
    config: ModelConfig, weights: Weights, seams: Seams, x_BTH: Tensor, run: Pass, layers: tuple[int, int]
) -> Stream:  # fmt: skip
    """Run layers of a decoder: from the first of `layers` up to the last, which is not run; its norm is applied."""
    assert run.attend is not None
    rotary = rotary_of(config, run.positions_BT, x_BTH.dtype)
    attend = attend_of(config, config.kinds[0], run.attend)
    first = layer_weights(weights, layers[0])
    stream = Stream(x_BTH, norm(config, first, config.norms.before_attention, x_BTH))
    for layer in range(*layers):
        own = replace(run.of_layer(layer), attend=attend)
        w = layer_weights(weights, layer) | next_norm(config, weights, layer)
        stream = seams.once(run_layer, config, config.kinds[0], w, seams, stream, rotary, own)
        run.keep(layer, own.state)
    return stream


def outputs_of(config: ModelConfig, weights: Weights, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the LM head's input, and what takes the place of the next position's features, of the layer's output."""
    normed_BTH = rms_norm(x_BTH, weights[NORM], config.norm_eps, config.norm_style)
    assert config.eagle3 is not None
    return normed_BTH, normed_BTH if config.eagle3.norm_output else x_BTH


def inputs_of(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the input of q, k and v, [B, T, 2 H] (of an MTP module [B, T, H]), and the residual stream [B, T, H]."""
    w = layer_weights(weights, 0)
    if config.eagle3 is not None and config.eagle3.mtp:
        x = joined(config, weights, seams, tokens_BT, features_BTH)
        return norm(config, w, config.norms.before_attention, x), x
    tokens = rms_norm(embed(config, weights, seams, tokens_BT), w["input_layernorm.weight"], config.norm_eps)
    head = config.eagle3
    assert head is not None
    normed = rms_norm(features_BTH, w["hidden_norm.weight"], config.norm_eps) if head.hidden_norm else features_BTH
    return torch.cat((tokens, normed), dim=-1), normed if head.norm_before_residual else features_BTH


def joined(config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, features_BTH: Tensor) -> Tensor:
    """Return the input of an MTP module's layer: embeddings and features, each normalised, through `fc`: [B, T, H]."""
    tokens_BTH = embed(config, weights, seams, tokens_BT)
    read = ((tokens_BTH, weights[TOKEN_NORM]), (features_BTH, weights[FEATURE_NORM]))
    both = [rms_norm(x_BTH, weight, config.norm_eps, config.norm_style) for x_BTH, weight in read]
    return seams.linear(torch.cat(both, dim=-1), weights[FC], config.hidden)
