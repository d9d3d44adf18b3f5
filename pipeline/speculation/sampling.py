"""Choose tokens from logits: exact argmax with the lowest id on ties, and temperature / top-k / top-p sampling.

A sampled token is the argmax of the kept scores plus Gumbel noise (Gumbel 1954), which has exactly their distribution.
The noise is a function of seed, position and token id (`noise.py`), so a request's answer depends on its seed alone:
a draft that samples with the same noise often agrees with the target (Daliri et al. 2024), and a speculative step
emits the tokens that decode steps would.

Shapes: B rows, T positions, M pairs of both, V vocabulary (whole unless stated otherwise), N candidates by descending
score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.parallel import PLAIN, Seams
from pipeline.speculation.noise import gumbel


@dataclass(frozen=True)
class Sampling:
    """How rows sample: temperature, top_p float [B], top_k int [B], seed int32 [B, 2]. Temperature 0 is greedy."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    seed_B2: Tensor


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


class Drawn(NamedTuple):
    """How M tokens are sampled: temperature, top_p float [M], top_k, position int32 [M], seed int32 [M, 2].

    `names_V` are the target's ids of the vocabulary, int32: noise belongs to these.
    """

    temperature_M: Tensor
    top_k_M: Tensor
    top_p_M: Tensor
    seed_M2: Tensor
    position_M: Tensor
    names_V: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Where logits come from: ranks that hold a slice each, from id `offset_1` on, and the number kept (None: all).

    With `keep` None the logits are of the whole vocabulary.
    """

    keep: int | None = None
    seams: Seams = PLAIN
    offset_1: Tensor | None = None


def sample(
    logits_BTV: Tensor, sampling: Sampling, positions_BT: Tensor, names_V: Tensor, of: Vocabulary
) -> Tensor:  # fmt: skip
    """Sample the tokens at positions: int64 [B, T]. Temperature, top-k and top-p, over the best tokens or all.

    A row with temperature 0 gets the argmax, so greedy and sampled requests share a batch.
    """
    batch, tokens = positions_BT.shape
    settings = (sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.seed_B2)
    temperature, top_k, top_p, seed = (setting.repeat_interleave(tokens, dim=0) for setting in settings)
    drawn = Drawn(temperature, top_k, top_p, seed, positions_BT.reshape(-1).int(), names_V)
    logits_MV = logits_BTV.reshape(batch * tokens, -1)
    if of.keep is not None:
        return sample_best(logits_MV, drawn, of).view(batch, tokens)
    operator = of.seams.sample_all
    return (sample_all(logits_MV, drawn) if operator is None else operator(logits_MV, *drawn)).view(batch, tokens)


def sample_all(logits_MV: Tensor, drawn: Drawn) -> Tensor:
    """Sample from all tokens: int64 [M]."""
    scores_MV, temperature_M1 = _scaled(logits_MV, drawn), drawn.temperature_M[:, None]
    lowest_M1 = lowest_kept(scores_MV.sort(dim=-1, descending=True).values, drawn)
    noise_MV = gumbel(drawn.seed_M2, drawn.position_M, drawn.names_V)
    noisy_MV = torch.where(scores_MV >= lowest_M1, scores_MV + noise_MV, -torch.inf)
    return greedy(torch.where(temperature_M1 > 0, noisy_MV, logits_MV), PLAIN, None)


def sample_best(logits_MV: Tensor, drawn: Drawn, of: Vocabulary) -> Tensor:
    """Sample from the `of.keep` tokens with the highest logits: int64 [M]. Ranks exchange these, not all logits."""
    assert of.keep is not None
    logits_MN, ids_MN = highest(logits_MV, of.keep, of.seams, of.offset_1)  # temperature keeps their order
    scores_MN = _scaled(logits_MN, drawn)
    names_MN = drawn.names_V[ids_MN.clamp(0, len(drawn.names_V) - 1)]
    noise_MN = gumbel(drawn.seed_M2, drawn.position_M, names_MN)
    noisy_MN = torch.where(scores_MN >= lowest_kept(scores_MN, drawn), scores_MN + noise_MN, -torch.inf)
    sampled_M = ids_MN.gather(-1, greedy(noisy_MN, PLAIN, None)[:, None])[:, 0]
    return torch.where(drawn.temperature_M > 0, sampled_M, greedy(logits_MV, of.seams, of.offset_1))


def highest(scores: Tensor, count: int, seams: Seams, offset_1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the `count` highest scores of the vocabulary, or all, descending, and their ids, int64.

    `scores` [..., V] are this rank's slice, from id `offset_1` on (None: whole). A rank sends its highest ones alone.
    """
    values, ids = seams.top(scores, min(count, scores.shape[-1]))
    if seams.tp == 1 or offset_1 is None:
        return values, ids
    ids = seams.all_gather(ids.int() + offset_1).long()
    values, places = seams.top(seams.all_gather(values), min(count, ids.shape[-1]))
    return values, ids.gather(-1, places)


def _scaled(logits_MV: Tensor, drawn: Drawn) -> Tensor:
    return logits_MV / torch.where(drawn.temperature_M > 0, drawn.temperature_M, 1.0)[:, None]


def lowest_kept(scores_MN: Tensor, drawn: Drawn) -> Tensor:
    """Return the lowest score that top-k, then top-p keep, [M, 1], of scores in descending order.

    top-p keeps the smallest set whose mass reaches p (Holtzman et al. 2019), including the token that crosses p.
    Tokens with equal scores are kept together, as in transformers.
    """
    size, top_k_M1, top_p_M1 = scores_MN.shape[-1], drawn.top_k_M[:, None], drawn.top_p_M[:, None]
    count_M1 = torch.where(top_k_M1 > 0, top_k_M1, size).clamp(max=size).long()
    scores_MN = torch.where(scores_MN >= scores_MN.gather(-1, count_M1 - 1), scores_MN, -torch.inf)
    probs_MN = torch.softmax(scores_MN, dim=-1)
    reached = (probs_MN.cumsum(dim=-1) - probs_MN >= top_p_M1) & (top_p_M1 < 1)
    dropped_MN = scores_MN == torch.full_like(scores_MN, -torch.inf)  # a tensor: XLA compares numbers in float64
    outside = (reached & (torch.arange(size, device=scores_MN.device) > 0)) | dropped_MN
    return torch.where(outside, torch.inf, scores_MN).amin(dim=-1, keepdim=True)
