"""The layers of a DFlash draft (arXiv 2602.06036): keys and values of the target's states, and a block over them.

A block is the newest token at position p and masks at the positions after it. Its queries see the keys of all positions
before p, which come from the target's states there, and the keys of the whole block, in some layers only those before.
The output at a position predicts the token at that position, or the one after it (`Eagle3.from_anchor`).
Pure functions.

Shapes: B rows, T tokens, S cached keys, H hidden, X the target's states that the draft reads, concatenated.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import (
    Stream,
    Weights,
    heads_of,
    kv_heads_of,
    layer_weights,
    mlp,
    next_norm,
    run_layer,
    store,
)
from pipeline.models.norms import norm, rms_norm
from pipeline.models.parallel import Attend, Pass, Seams, attend_up_to
from pipeline.models.rank_slices import local_heads
from pipeline.models.rotary import Rotary, rotary_of, rotate
from pipeline.models.vocabulary import embed
from pipeline.models.weights import CONTEXT_NORM, FC, NORM


def context(config: ModelConfig, weights: Weights, seams: Seams, states_BTX: Tensor) -> Tensor:
    """Return what the layers make keys and values of: [B, T, X] -> [B, T, H]."""
    out_BTH = seams.linear(states_BTX, weights[FC], config.hidden)
    return rms_norm(out_BTH, weights[CONTEXT_NORM], config.norm_eps)


def write_context(config: ModelConfig, weights: Weights, seams: Seams, context_BTH: Tensor, run: Pass) -> None:
    """Write keys and values of positions that the target has processed, in all layers."""
    rotary = rotary_of(config, run.positions_BT, context_BTH.dtype)
    seams = seams.of_live(run.live_BT)
    for layer in range(config.layers):
        own = run.of_layer(layer)
        store(config, layer_weights(weights, layer), seams, context_BTH, rotary, own)
        run.keep(layer, own.state)


def block_states(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, run: Pass, last_BT: Tensor
) -> Tensor:  # fmt: skip
    """Return the LM head's input at the positions of a block, [B, T, H]; its keys go into the caches.

    `run.attend` has the keys of a causal layer, `last_BT` the last key of the others: the end of the block.
    """
    head = config.eagle3
    assert head is not None
    assert run.attend is not None
    whole = attend_up_to(last_BT, run.attend.kv)
    seams = seams.of_live(run.live_BT)
    x_BTH = embed(config, weights, seams, tokens_BT)
    rotary = rotary_of(config, run.positions_BT, x_BTH.dtype)
    stream = Stream(x_BTH, norm(config, layer_weights(weights, 0), config.norms.before_attention, x_BTH))
    for layer in range(config.layers):
        own = replace(run.of_layer(layer), attend=run.attend if layer in head.causal_layers else whole)
        w = layer_weights(weights, layer) | next_norm(config, weights, layer)
        stream = seams.once(run_layer, config, config.kinds[0], w, seams, stream, rotary, own)
        run.keep(layer, own.state)
    return stream.normed_BTH


def pair_states(
    config: ModelConfig, weights: Weights, seams: Seams, tokens_BT2: Tensor, run: Pass, kv: int
) -> Tensor:  # fmt: skip
    """Return the LM head's input at the first answer of a block of two positions for each token, [B, T, H].

    That is the position of the mask, or with `from_anchor` that of the token. Every token
    begins a block of its own, over the cached keys before it; nothing is written.
    Shapes: tokens_BT2 int [B, 2 T], the tokens and as many masks; positions of the tokens [B, T] in `run`.
    """
    head = config.eagle3
    assert head is not None
    positions_BT2 = torch.cat((run.positions_BT, run.positions_BT + 1), dim=1)
    biases = {causal: _pair_bias(run.positions_BT, kv, causal=causal) for causal in (False, True)}
    x_BTH = embed(config, weights, seams, tokens_BT2)
    rotary = rotary_of(config, positions_BT2, x_BTH.dtype)
    for layer in range(config.layers):
        w = layer_weights(weights, layer)
        attend = Attend(positions_BT2, 0, biases[layer in head.causal_layers], ranged=False)
        x_BTH = x_BTH + _pair_attention(
            config, w, seams, x_BTH, rotary, replace(run.of_layer(layer), attend=attend), kv
        )
        x_BTH = x_BTH + mlp(config, w, seams, norm(config, w, config.norms.before_mlp, x_BTH))
    tokens = run.positions_BT.shape[1]
    answers_BTH = x_BTH[:, :tokens] if head.from_anchor else x_BTH[:, tokens:]
    return rms_norm(answers_BTH, weights[NORM], config.norm_eps)


def _pair_bias(positions_BT: Tensor, kv: int, *, causal: bool) -> Tensor:
    """Return 0 where a slot of a block sees a key, else -inf, [B, 2 T, S + 2 T]: of cached keys, then of all slots."""
    tokens = positions_BT.shape[1]
    keys_S = torch.arange(kv, device=positions_BT.device)
    before_BTS = (keys_S < positions_BT[..., None]).repeat(1, 2, 1)
    slots = torch.arange(2 * tokens, device=positions_BT.device)
    own_TT = slots[:, None] % tokens == slots % tokens
    own_TT = own_TT & (slots <= slots[:, None]) if causal else own_TT
    seen = torch.cat((before_BTS, own_TT.expand(len(positions_BT), -1, -1)), dim=-1)
    return torch.where(seen, 0.0, -math.inf)


def _pair_attention(
    config: ModelConfig, w: Weights, seams: Seams, x_BTH: Tensor, rotary: Rotary | None, own: Pass, kv: int
) -> Tensor:  # fmt: skip
    """Attend with blocks of two over a layer's cached keys and their own: [B, 2 T, H]."""
    assert own.attend is not None
    heads, kv_heads = local_heads(config, seams.tp), kv_heads_of(config, seams)
    normed_BTH = norm(config, w, config.norms.before_attention, x_BTH)
    turned, v = heads_of(config, w, seams, normed_BTH, "qkv").split((heads + kv_heads, kv_heads), dim=1)
    q, k = rotate(turned, rotary).split((heads, kv_heads), dim=1)
    rows = len(x_BTH)
    keys, values = (torch.cat((own.state[name][:rows, :, :kv], new), dim=2) for name, new in (("k", k), ("v", v)))
    out_BTX = seams.attend(q, keys, values, own.attend)
    out = seams.all_reduce(seams.linear(out_BTX, w["self_attn.o_proj.weight"], config.hidden))
    bias = w.get("self_attn.o_proj.bias")
    return out if bias is None else out + bias
