"""Both ends of a decoder: the embedding of tokens and the logits, which ranks share out. Pure functions.

Shapes: B rows, T tokens, H hidden, V vocabulary, this rank's share of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.parallel import Seams, capped
from pipeline.models.rank_slices import padded_vocab
from pipeline.models.weights import EMBEDDING, HEAD, NORM, OFFSET

Weights = Mapping[str, Tensor]


def logits(config: ModelConfig, weights: Weights, seams: Seams, hidden_BTH: Tensor, limit: int | None = None) -> Tensor:
    """Return this rank's slice of the logits, float32 [B, T, V]; -inf from id `limit` (None: the vocabulary) on."""
    rows = vocab_rows(config.out_vocab, seams.tp)
    if config.tied:
        out_BTV = seams.tied_head(hidden_BTH, weights[EMBEDDING], rows)
    else:
        out_BTV = seams.head(hidden_BTH, weights[HEAD], rows)
    if config.logit_scale != 1:
        out_BTV = out_BTV * config.logit_scale
    out_BTV = capped(out_BTV, config.logit_cap)
    size = min(limit or config.out_vocab, config.out_vocab)
    if rows * seams.tp == size:
        return out_BTV
    ids_V = torch.arange(rows, device=out_BTV.device) + weights[OFFSET]
    return torch.where(ids_V < size, out_BTV, -math.inf)


def vocab_rows(vocab: int, tp: int) -> int:
    """Return the vocabulary rows of one rank: all on a single rank, whole blocks when split."""
    return vocab if tp == 1 else padded_vocab(vocab, tp) // tp


def embed(config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor) -> Tensor:
    """Embed tokens: int [B, T] -> [B, T, H], in the model's dtype, scaled as the config says."""
    return scaled(embedded(config, weights, seams, tokens_BT), config.embedding_scale)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Multiply embeddings by a scale, which transformers rounds to the model's dtype: a tensor."""
    return x if scale == 1 else x * torch.full((), scale, dtype=x.dtype, device=x.device)


def embedded(config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor, name: str = EMBEDDING) -> Tensor:
    """Look tokens up in an embedding, which ranks share out: [B, T, H], in the model's dtype."""
    table, dtype = weights[name], weights[NORM].dtype
    if seams.tp == 1:
        return seams.embed(tokens_BT, table).to(dtype)
    rows = vocab_rows(config.vocab, seams.tp)
    local_BT = tokens_BT - weights[OFFSET]
    mine_BT = (local_BT >= 0) & (local_BT < rows)
    x_BTH = seams.embed(local_BT.clamp(0, rows - 1), table).to(dtype)
    return seams.own_tokens(torch.where(mine_BT[..., None], x_BTH, torch.zeros_like(x_BTH)))
