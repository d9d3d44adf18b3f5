"""Inputs of each layer beside the residual stream: the per-layer embeddings of Gemma 4. Pure functions.

Shapes: B rows, T tokens, H hidden, L layers, P size of a layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models.activations import activated
from pipeline.models.config import ModelConfig
from pipeline.models.norms import norm, rms_norm
from pipeline.models.parallel import Seams
from pipeline.models.vocabulary import embedded, scaled
from pipeline.models.weights import AFTER_INPUT, FROM_INPUT, INPUT_GATE, INPUT_PROJECTION, LAYER_EMBEDDING, OF_INPUTS

Weights = Mapping[str, Tensor]


def layer_inputs(config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, x_BTH: Tensor) -> Tensor:
    """Return the inputs of all layers, from tokens and their embeddings: [B, T, L, P], in the model's dtype."""
    assert config.layer_input is not None
    sizes = (config.layers, config.layer_input)
    rows = config.layers * config.layer_input
    of_stream = seams.linear(x_BTH, weights[INPUT_PROJECTION], rows) * config.hidden**-0.5
    of_stream = rms_norm(of_stream.unflatten(-1, sizes), weights[OF_INPUTS], config.norm_eps, config.norm_style)
    of_tokens = scaled(embedded(config, weights, seams, tokens_BT, LAYER_EMBEDDING), config.layer_input**0.5)
    return (of_stream + of_tokens.unflatten(-1, sizes)) * 2**-0.5


def with_input(config: ModelConfig, w: Weights, seams: Seams, x_BTH: Tensor, input_BTP: Tensor) -> Tensor:
    """Add a layer's input to its output, through a gate: [B, T, H]."""
    gate_BTP = seams.linear(x_BTH, w[f"{INPUT_GATE}.weight"], input_BTP.shape[-1])
    inner_BTP = activated(config.activation, gate_BTP) * input_BTP
    return x_BTH + norm(config, w, AFTER_INPUT, seams.linear(inner_BTP, w[f"{FROM_INPUT}.weight"], config.hidden))
