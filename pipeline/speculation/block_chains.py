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
from pipeline.models.decoder import heads_of, layer_weights, mlp, project
from pipeline.models.dflash_layers import context
from pipeline.models.norms import rms_norm
from pipeline.models.parallel import PLAIN
from pipeline.models.rotary import Rotary, rotary_of, rotate
from pipeline.models.vocabulary import embed
from pipeline.models.weights import HEAD, NORM
from pipeline.speculation.chains import Batch, Guess, ahead


def guesses(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, depths: int) -> Iterator[Guess]:
    """Yield the first `depths` answers of blocks that begin at every position, or at `batch.begins_BA`.

    Of a DSpark draft an answer follows the text's own token before it.
    """
    head = config.eagle3
    assert head is not None
    first = 0 if head.from_anchor else 1
    context_BTH = context(config, weights, PLAIN, batch.taps_BTX)
    every_BA = torch.arange(context_BTH.shape[1], device=context_BTH.device).expand(len(context_BTH), -1)
    begins_BA = every_BA if batch.begins_BA is None else batch.begins_BA
    rows = zip(batch.tokens_BT1, context_BTH, begins_BA, strict=True)
    hidden_BASH = torch.stack([_blocks(config, weights, of_row, depths + first) for of_row in rows])
    state_BAR = None
    for depth in range(depths):
        # As of a head: a chain that began at position i has read token i + 1, and answers with token i + depth + 2.
        rows_M, blocks_M = ahead(batch.learn_BT, depth + 1).gather(1, begins_BA).nonzero(as_tuple=True)
        began_M = begins_BA[rows_M, blocks_M]
        logits_MV = PLAIN.linear(hidden_BASH[rows_M, blocks_M, depth + first], weights[HEAD], config.out_vocab)
        if head.markov is not None:
            before_BA = (begins_BA + depth + 1).clamp(max=batch.tokens_BT1.shape[1] - 1)
            previous_BA = batch.tokens_BT1.gather(1, before_BA)
            bias, state_BAR = markov.bias(
                config, weights, PLAIN, previous_BA, hidden_BASH[:, :, depth + first], state_BAR
            )
            logits_MV = logits_MV + bias[rows_M, blocks_M].to(logits_MV.dtype)
        yield Guess(logits_MV, rows_M, began_M + depth + 1, began_M)


@dataclass(frozen=True)
class _Heads:
    """Keys and values of the context, [G, T, D], the rotary embedding of a sequence's blocks, and where they begin."""

    keys_GTD: Tensor
    values_GTD: Tensor
    rotary: Rotary | None
    begins_A: Tensor


def _blocks(
    config: ModelConfig, weights: dict[str, Tensor], of_row: tuple[Tensor, Tensor, Tensor], size: int
) -> Tensor:
    """Return the LM head's input at every position of the blocks of one sequence, [A, S, H].

    `of_row` are its tokens [T + 1], its context [T, H], and the positions before its blocks, [A].
    """
    tokens_T1, context_TH, begins_A = of_row
    head, length = config.eagle3, len(context_TH)
    assert head is not None
    assert head.mask_token is not None
    ids_AS = torch.full((len(begins_A), size), head.mask_token, dtype=torch.long, device=tokens_T1.device)
    ids_AS[:, 0] = tokens_T1[begins_A + 1]
    positions_T = torch.arange(length, device=tokens_T1.device)
    positions_AS = begins_A[:, None] + 1 + torch.arange(size, device=tokens_T1.device)
    x_1MH = embed(config, weights, PLAIN, ids_AS.view(1, -1))
    rotaries = [rotary_of(config, positions[None], x_1MH.dtype) for positions in (positions_T, positions_AS.flatten())]
    for layer in range(config.layers):
        w = layer_weights(weights, layer)
        k, v = heads_of(config, w, PLAIN, context_TH[None], "kv").chunk(2, dim=1)
        heads = _Heads(rotate(k, rotaries[0])[0], v[0], rotaries[1], begins_A)
        normed_1MH = rms_norm(x_1MH, w["input_layernorm.weight"], config.norm_eps)
        out_1MX = _attend(config, w, normed_1MH, heads, size, causal=layer in head.causal_layers)
        x_1MH = x_1MH + project(w, PLAIN, out_1MX, {"self_attn.o_proj": config.hidden})
        normed_1MH = rms_norm(x_1MH, w["post_attention_layernorm.weight"], config.norm_eps)
        x_1MH = x_1MH + mlp(config, w, PLAIN, normed_1MH)
    return rms_norm(x_1MH, weights[NORM], config.norm_eps).view(len(begins_A), size, -1)


def _attend(
    config: ModelConfig, w: dict[str, Tensor], normed_1MH: Tensor, heads: _Heads, size: int, *, causal: bool
) -> Tensor:  # fmt: skip
    """Return attention of all blocks, each over the context before it and over itself: [1, M, N * D]."""
    counts = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = heads_of(config, w, PLAIN, normed_1MH, "qkv")[0].split(counts, dim=0)
    q, k = (rotate(each[None], heads.rotary)[0] for each in (q, k))
    (length, dim), blocks = heads.keys_GTD.shape[1:], len(heads.begins_A)
    q = q.view(config.kv_heads, -1, blocks, size, dim)
    k, v = (each.view(config.kv_heads, blocks, size, dim) for each in (k, v))
    before_AT = torch.arange(length, device=q.device) <= heads.begins_A[:, None]
    scores = torch.einsum("grasd,gtd->grast", q, heads.keys_GTD).float()
    scores = scores.masked_fill(~before_AT[:, None], -math.inf)
    own = torch.einsum("grasd,gaud->grasu", q, k).float()
    if causal:
        own = own.masked_fill(~torch.ones(size, size, dtype=torch.bool, device=q.device).tril(), -math.inf)
    shares = torch.softmax(torch.cat((scores, own), dim=-1) * dim**-0.5, dim=-1).to(v.dtype)
    out = torch.einsum("grast,gtd->grasd", shares[..., :length], heads.values_GTD)
    out = out + torch.einsum("grasu,gaud->grasd", shares[..., length:], v)
    return out.reshape(config.heads, blocks * size, dim).transpose(0, 1).reshape(1, blocks * size, -1)
