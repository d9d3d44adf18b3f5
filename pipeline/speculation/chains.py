"""Several drafted tokens in a row of a head, from every position of a text at once (Li et al. 2025).

A training learns from them, and a draft's agreement with its target is measured by them. Depth 0 reads the target's
features, depth s the head's own output at depth s - 1, as drafting does ("training-time test"); a P-EAGLE head reads a
masked position there. A query of depth s sees the depth-0 keys up to where its chain began, and the keys of its own
chain.

Shapes: B sequences, T positions, H hidden, N query heads, G KV heads, D head size, V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import feed_forward, heads_of, layer_weights, project
from pipeline.models.eagle3_layer import features, inputs_of, outputs_of
from pipeline.models.norms import norm
from pipeline.models.parallel import PLAIN
from pipeline.models.rotary import Rotary, rotary_of, rotate
from pipeline.models.weights import HEAD, MASK_HIDDEN


@dataclass(frozen=True)
class Batch:
    """Sequences right-padded to T: tokens int64 [B, T + 1], features of the first T, and positions to learn.

    `learn_BT` marks tokens of the answer, by the position whose distribution gives them: position i gives token i + 1.
    `begins_BA` int64 are the positions at which chains begin, as many in each sequence; None: all. Heads begin at all.
    """

    tokens_BT1: Tensor
    taps_BTX: Tensor
    last_BTH: Tensor
    learn_BT: Tensor
    begins_BA: Tensor | None = None


@dataclass(frozen=True)
class Guess:
    """A draft's answers at one depth: logits [M, V] for the M positions to learn.

    `rows_M` and `positions_M` are sequence and position of the target's distribution that each answer predicts,
    `began_M` is the position at which its chain began.
    """

    logits_MV: Tensor
    rows_M: Tensor
    positions_M: Tensor
    began_M: Tensor


@dataclass(frozen=True)
class _Kept:
    """Keys and values of one layer, of each depth."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def guesses(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, depths: int) -> Iterator[Guess]:
    """Yield the answers of `depths` draft tokens from every position at once."""
    assert config.eagle3 is not None
    read_BTX = batch.last_BTH if config.eagle3.reads_output else batch.taps_BTX
    x_BTH = features(config, weights, PLAIN, read_BTX)
    positions_T = torch.arange(read_BTX.shape[1], device=x_BTH.device)
    kept = [_Kept() for _ in range(config.layers)]
    for depth in range(depths):
        tokens_BT = ahead(batch.tokens_BT1[:, :-1], depth + 1)
        if depth and config.eagle3.mask_token is not None:
            tokens_BT = torch.full_like(tokens_BT, config.eagle3.mask_token)
            x_BTH = features(config, weights, PLAIN, weights[MASK_HIDDEN].expand_as(read_BTX))
        rotary = rotary_of(config, (positions_T + depth)[None], x_BTH.dtype)
        x_BTH = _run_layer(config, weights, inputs_of(config, weights, PLAIN, tokens_BT, x_BTH), rotary, (0, kept[0]))
        for layer in range(1, config.layers):
            normed_BTH = norm(config, layer_weights(weights, layer), config.norms.before_attention, x_BTH)
            x_BTH = _run_layer(config, weights, (normed_BTH, x_BTH), rotary, (layer, kept[layer]))
        # The chain from position i has read up to token i + depth + 1: its answer predicts position i + depth + 1.
        rows_M, began_M = ahead(batch.learn_BT, depth + 1).nonzero(as_tuple=True)
        last_BTH, x_BTH = outputs_of(config, weights, x_BTH)
        logits_MV = PLAIN.linear(last_BTH[rows_M, began_M], weights[HEAD], config.out_vocab)
        yield Guess(logits_MV, rows_M, began_M + depth + 1, began_M)


def _run_layer(
    config: ModelConfig, weights: dict[str, Tensor], read: tuple[Tensor, Tensor], rotary: Rotary | None,
    layer: tuple[int, _Kept],
) -> Tensor:  # fmt: skip
    """Run one layer at one depth over its input, normalised, and the residual before it; keep its keys and values."""
    number, kept = layer
    w = layer_weights(weights, number)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = heads_of(config, w, PLAIN, read[0], "qkv").split(heads, dim=1)
    kept.keys.append(rotate(k, rotary))
    kept.values.append(v)
    attended_BTX = _attend(rotate(q, rotary), kept.keys, kept.values)
    if config.attention_gate:
        rows = {"self_attn.q_gate_proj": config.heads * config.head_dim}
        attended_BTX = attended_BTX * torch.sigmoid(project(w, PLAIN, read[0], rows))
    x_BTH = read[1] + project(w, PLAIN, attended_BTX, {"self_attn.o_proj": config.hidden})
    normed_BTH = norm(config, w, config.norms.before_mlp, x_BTH)
    return x_BTH + feed_forward(config, config.kinds[0], w, PLAIN, normed_BTH)[0]


def ahead(values_BT: Tensor, by: int) -> Tensor:
    """Return for each position the value `by` positions later; zeros (False) beyond the end."""
    moved = torch.zeros_like(values_BT)
    moved[:, : max(values_BT.shape[1] - by, 0)] = values_BT[:, by:]
    return moved


def _attend(q_BNTD: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return attention of the last depth, over depth 0 up to each position and over its own chain: [B, T, N * D]."""
    batch, heads, length, dim = q_BNTD.shape
    groups = keys[0].shape[1]
    q = q_BNTD.reshape(batch, groups, heads // groups, length, dim)
    scale = dim**-0.5
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, keys[0]).float() * scale
    parts = [scores.masked_fill(~causal_TT, -math.inf)]
    parts += [(q * k[:, :, None]).sum(-1, keepdim=True).float() * scale for k in keys[1:]]
    weights = torch.softmax(torch.cat(parts, dim=-1), dim=-1).to(q.dtype)
    out = torch.einsum("bgrts,bgsd->bgrtd", weights[..., :length], values[0])
    for number, v in enumerate(values[1:]):
        out = out + weights[..., length + number, None] * v[:, :, None]
    return out.reshape(batch, heads, length, dim).transpose(1, 2).reshape(batch, length, heads * dim)
