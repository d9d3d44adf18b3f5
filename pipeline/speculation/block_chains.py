"""All draft tokens of the block of a DFlash or DSpark draft, from every position of a text at once; see `chains`.

Shapes: B sequences, T positions, A blocks of a sequence, S positions of a block, H hidden, N query heads, G KV heads,
D head size, V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models import markov
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import embed, heads_of, layer_weights, mlp, project, rms_norm
from pipeline.models.dflash_layers import context
from pipeline.models.parallel import PLAIN
from pipeline.models.rotary import Rotary, rotary_of, rotate
from pipeline.models.weights import HEAD, NORM
from pipeline.speculation.chains import Batch, Guess, ahead


def guesses(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, depths: int) -> Iterator[Guess]:
    """Yield the first `depths` answers of blocks that begin at every position.

    Of a DSpark draft an answer follows the text's own token before it.
    """
    head = config.eagle3
    assert head is not None
    first = 0 if head.from_anchor else 1
    context_BTH = context(config, weights, PLAIN, batch.taps_BTX)
    rows = zip(batch.tokens_BT1, context_BTH, strict=True)
    hidden_BASH = torch.stack([_blocks(config, weights, tokens, states, depths + first) for tokens, states in rows])
    state_BAR = None
    for depth in range(depths):
        # As of a head: a chain that began at position i has read token i + 1, and answers with token i + depth + 2.
        rows_M, began_M = ahead(batch.learn_BT, depth + 1).nonzero(as_tuple=True)
        logits_MV = PLAIN.linear(hidden_BASH[rows_M, began_M, depth + first], weights[HEAD], config.out_vocab)
        if head.markov is not None:
            previous_BA = batch.tokens_BT1.roll(-depth - 1, dims=1)[:, : hidden_BASH.shape[1]]
            bias, state_BAR = markov.bias(
                config, weights, PLAIN, previous_BA, hidden_BASH[:, :, depth + first], state_BAR
            )
            logits_MV = logits_MV + bias[rows_M, began_M].to(logits_MV.dtype)
        yield Guess(logits_MV, rows_M, began_M + depth + 1, began_M)


@dataclass(frozen=True)
class _Heads:
    """Keys and values of the context, [G, T, D], and the rotary embedding of a sequence's blocks."""

    keys_GTD: Tensor
    values_GTD: Tensor
    rotary: Rotary | None


def _blocks(
    config: ModelConfig, weights: dict[str, Tensor], tokens_T1: Tensor, context_TH: Tensor, size: int
) -> Tensor:
    """Return the LM head's input at every position of the blocks of one sequence, [A, S, H]."""
    head, length = config.eagle3, len(context_TH)
    assert head is not None
    assert head.mask_token is not None
    ids_AS = torch.full((length, size), head.mask_token, dtype=torch.long, device=tokens_T1.device)
    ids_AS[:, 0] = tokens_T1[1:]
    positions_T = torch.arange(length, device=tokens_T1.device)
    positions_AS = positions_T[:, None] + 1 + torch.arange(size, device=tokens_T1.device)
    x_1MH = embed(config, weights, PLAIN, ids_AS.view(1, -1))
    rotaries = [rotary_of(config, positions[None], x_1MH.dtype) for positions in (positions_T, positions_AS.flatten())]
    for layer in range(config.layers):
        w = layer_weights(weights, layer)
        k, v = heads_of(config, w, PLAIN, context_TH[None], "kv").chunk(2, dim=1)
        heads = _Heads(rotate(k, rotaries[0])[0], v[0], rotaries[1])
        normed_1MH = rms_norm(x_1MH, w["input_layernorm.weight"], config.norm_eps)
        out_1MX = _attend(config, w, normed_1MH, heads, size, causal=layer in head.causal_layers)
        x_1MH = x_1MH + project(w, PLAIN, out_1MX, {"self_attn.o_proj": config.hidden})
        normed_1MH = rms_norm(x_1MH, w["post_attention_layernorm.weight"], config.norm_eps)
        x_1MH = x_1MH + mlp(config, w, PLAIN, normed_1MH)
    return rms_norm(x_1MH, weights[NORM], config.norm_eps).view(length, size, -1)


def _attend(
    config: ModelConfig, w: dict[str, Tensor], normed_1MH: Tensor, heads: _Heads, size: int, *, causal: bool
) -> Tensor:  # fmt: skip
    """Return attention of all blocks, each over the context before it and over itself: [1, M, N * D]."""
    counts = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = heads_of(config, w, PLAIN, normed_1MH, "qkv")[0].split(counts, dim=0)
    q, k = (rotate(each[None], heads.rotary)[0] for each in (q, k))
    length, dim = heads.keys_GTD.shape[1:]
    q = q.view(config.kv_heads, -1, length, size, dim)
    k, v = (each.view(config.kv_heads, length, size, dim) for each in (k, v))
    before_AT = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()  # block i follows position i
    scores = torch.einsum("grasd,gtd->grast", q, heads.keys_GTD).float()
    scores = scores.masked_fill(~before_AT[:, None], -math.inf)
    own = torch.einsum("grasd,gaud->grasu", q, k).float()
    if causal:
        own = own.masked_fill(~torch.ones(size, size, dtype=torch.bool, device=q.device).tril(), -math.inf)
    shares = torch.softmax(torch.cat((scores, own), dim=-1) * dim**-0.5, dim=-1).to(v.dtype)
    out = torch.einsum("grast,gtd->grasd", shares[..., :length], heads.values_GTD)
    out = out + torch.einsum("grasu,gaud->grasd", shares[..., length:], v)
    return out.reshape(config.heads, length * size, dim).transpose(0, 1).reshape(1, length * size, -1)
