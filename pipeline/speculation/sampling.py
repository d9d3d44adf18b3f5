"""Choose tokens from logits: exact argmax with the lowest id on ties, and temperature / top-k / top-p sampling.

Random numbers are arguments, so everything here is deterministic.

Shapes: B rows, T positions, V vocabulary (whole unless stated otherwise), N candidates, sorted by descending logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.parallel import PLAIN, Seams


@dataclass(frozen=True)
class Sampling:
    """Per-row sampling parameters: temperature float [B] (0 = greedy), top_k int [B] (0 = off), top_p float [B]."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor


@dataclass(frozen=True)
class Candidates:
    """A truncated distribution: token ids int64 [B, T, N] and their probabilities float32 [B, T, N], summing to 1."""

    ids_BTN: Tensor
    probs_BTN: Tensor


def greedy(logits_BTV: Tensor, seams: Seams, offset_1: Tensor | None) -> Tensor:
    """Return the highest-scoring token, int64 [B, T]; ties go to the lowest id on any number of ranks.

    `logits_BTV` is this rank's slice and `offset_1` its first vocabulary id (None on a single rank).
    """
    best_BT1 = logits_BTV.amax(dim=-1, keepdim=True)
    size = logits_BTV.shape[-1]
    ids_V = torch.arange(size, dtype=torch.int32, device=logits_BTV.device)
    first_BT1 = torch.where(logits_BTV == best_BT1, ids_V, size - 1).amin(dim=-1, keepdim=True)
    if seams.tp == 1 or offset_1 is None:
        return first_BT1[..., 0].long()
    bests_BTR = seams.all_gather(best_BT1)
    ids_BTR = seams.all_gather(first_BT1 + offset_1)
    lead_BT1 = bests_BTR.amax(dim=-1, keepdim=True)
    return torch.where(bests_BTR == lead_BT1, ids_BTR, size * seams.tp).amin(dim=-1).long()


def candidates(
    logits_BTV: Tensor, sampling: Sampling, keep: int | None, seams: Seams = PLAIN
) -> Candidates:  # fmt: skip
    """Return the distribution to sample: temperature, then top-k, then top-p, over the best `keep` tokens (None: all).

    Rows with temperature 0 put all mass on the argmax, so greedy and sampled requests share a batch. top-p keeps
    the smallest set whose mass reaches p (Holtzman et al. 2019), including the token that crosses p.
    """
    size = logits_BTV.shape[-1]
    scores, ids = seams.top(logits_BTV, min(keep or size, size))
    rank_N = torch.arange(scores.shape[-1], device=scores.device)
    temperature = sampling.temperature_B[:, None, None]
    is_greedy = temperature <= 0
    best_BT1 = greedy(logits_BTV, PLAIN, None)[..., None]
    ids = torch.where(is_greedy & (rank_N == 0), best_BT1, ids)
    scores = scores / torch.where(is_greedy, torch.ones_like(temperature), temperature)
    top_k = torch.where(sampling.top_k_B > 0, sampling.top_k_B, size)[:, None, None]
    top_k = torch.where(is_greedy, torch.ones_like(top_k), top_k)
    scores = torch.where(rank_N < top_k, scores, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    nucleus = torch.where((before < sampling.top_p_B[:, None, None]) | (rank_N == 0), probs, torch.zeros_like(probs))
    return Candidates(ids, nucleus / nucleus.sum(dim=-1, keepdim=True))


def certain(choice: Candidates, tokens_BT: Tensor) -> Candidates:
    """Put all mass on `tokens_BT` where not negative; a token that is no candidate replaces the least likely one."""
    token_BT1 = tokens_BT[..., None]
    present_BT1 = (choice.ids_BTN == token_BT1).any(dim=-1, keepdim=True)
    index_N = torch.arange(choice.ids_BTN.shape[-1], device=tokens_BT.device)
    replaced_BTN = ~present_BT1 & (index_N == choice.ids_BTN.shape[-1] - 1)
    ids_BTN = torch.where((token_BT1 >= 0) & replaced_BTN, token_BT1, choice.ids_BTN)
    is_token_BTN = ids_BTN == token_BT1
    first_BTN = is_token_BTN & (is_token_BTN.int().cumsum(dim=-1) == 1)  # a tied argmax may occur twice
    probs_BTN = torch.where(token_BT1 >= 0, first_BTN.to(choice.probs_BTN.dtype), choice.probs_BTN)
    return Candidates(ids_BTN, probs_BTN)


def draw(choice: Candidates, uniforms_BT: Tensor) -> Tensor:
    """Sample one token per position by inverting the cumulative distribution: int64 [B, T]."""
    index_BT1 = pick(choice.probs_BTN, uniforms_BT)
    return choice.ids_BTN.gather(-1, index_BT1)[..., 0]


def pick(weights_BTN: Tensor, uniforms_BT: Tensor) -> Tensor:
    """Draw an index in proportion to non-negative weights, int64 [B, T, 1]; never an index of weight zero.

    The uniform is scaled by the total, so weights need no normalisation; rounding at the top end gives the last index
    with a positive weight.
    """
    cumulative = weights_BTN.cumsum(dim=-1)
    threshold = uniforms_BT[..., None] * cumulative[..., -1:]
    index = (cumulative <= threshold).sum(dim=-1, keepdim=True)
    positions = torch.arange(weights_BTN.shape[-1], dtype=torch.int32, device=weights_BTN.device)
    last = torch.where(weights_BTN > 0, positions, 0).amax(dim=-1, keepdim=True)
    return torch.minimum(index, last.long())
