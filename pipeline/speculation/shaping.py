"""What requests ask of the target's scores beyond temperature, top-k and top-p: one function for every row of a batch.

Order as in vLLM 0.32: allowed tokens, bias, penalties, `min_p`; then `sampling.py`. A draft is proposed without them:
it only changes how many tokens a step emits.

Shapes: B rows, T = K + 1 positions, K draft tokens, V vocabulary of the target, W = V / 32 words, rounded up, N tokens
whose log probabilities are reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.parallel import PLAIN, Seams
from pipeline.speculation.sampling import highest

WORD_BITS = torch.iinfo(torch.int32).bits
WORD_SHIFT = WORD_BITS.bit_length() - 1
SMALLEST = 1e-30
"""Stands for a `min_p` of 0 inside a logarithm whose result is not used."""


@dataclass(frozen=True)
class Shaping:
    """How rows change their scores; a row that asks for nothing has neutral values.

    `bias_BV` float32 is added. `counts_BV` int32: how often each token is in the row's answer; `prompted_BV` bool:
    whether it is in the row's prompt. `allowed_BTW` int32: a bit for each token, the lowest of the first word for
    token 0. `min_p_B` (0: off), `presence_B`, `frequency_B` (0: off) and `repetition_B` (1: off) are float32.
    """

    bias_BV: Tensor
    counts_BV: Tensor
    prompted_BV: Tensor
    allowed_BTW: Tensor
    min_p_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor
    repetition_B: Tensor


class LogProbs(NamedTuple):
    """Log probabilities of the target, before shaping and temperature, at T positions.

    `chosen_BT` float32 and `rank_BT` int32 (1: the most probable) belong to the chosen tokens, `top_BTN` float32 and
    `top_ids_BTN` int32 to the most probable ones.
    """

    chosen_BT: Tensor
    rank_BT: Tensor
    top_BTN: Tensor
    top_ids_BTN: Tensor


@dataclass(frozen=True)
class Share:
    """The ids of a rank: `size` ones, whole words of `allowed`, from `offset_1` on (int32 [1]; None: from 0, all)."""

    seams: Seams = PLAIN
    size: int = 0
    offset_1: Tensor | None = None

    def of(self, shaping: Shaping) -> Shaping:
        """Return the rank's columns; ids beyond the vocabulary are not allowed."""
        if self.offset_1 is None:
            return shaping
        word_1, words = self.offset_1 >> WORD_SHIFT, self.size // WORD_BITS
        own = {
            name: self._columns(getattr(shaping, name), self.offset_1, self.size)
            for name in ("bias_BV", "counts_BV", "prompted_BV")
        }
        return replace(shaping, **own, allowed_BTW=self._columns(shaping.allowed_BTW, word_1, words))

    def _columns(self, whole: Tensor, first_1: Tensor, size: int) -> Tensor:
        """Return `size` entries of the last axis from `first_1` on, of a tensor filled up with zeros."""
        missing = size * self.seams.tp - whole.shape[-1]
        padded = functional.pad(whole, (0, missing)) if missing > 0 else whole
        return padded[..., first_1 + torch.arange(size, device=whole.device)]

    def best(self, scores: Tensor) -> Tensor:
        """Return the highest score of all ranks, [..., 1]."""
        best = scores.amax(dim=-1, keepdim=True)
        return best if self.offset_1 is None else self.seams.all_gather(best).amax(dim=-1, keepdim=True)


WHOLE = Share()
"""All ids, on each rank."""


def shape(
    logits_BTV: Tensor, shaping: Shaping, drafts_BK: Tensor, temperature_B: Tensor, share: Share = WHOLE
) -> Tensor:  # fmt: skip
    """Return the scores that the rows ask for, float32 [B, T, V]; position t follows the first t drafts.

    Logits and scores are those of a rank's share of the vocabulary, `shaping` is of all of it.
    """
    shaping = share.of(shaping)
    scores_BTV = logits_BTV + shaping.bias_BV[:, None]
    counts_BTV = counts_along(shaping.counts_BV, drafts_BK, share.offset_1)
    seen_BTV = (counts_BTV > 0) | shaping.prompted_BV[:, None]
    factor_B11 = shaping.repetition_B[:, None, None]
    repeated_BTV = torch.where(scores_BTV > 0, scores_BTV / factor_B11, scores_BTV * factor_B11)
    scores_BTV = torch.where(seen_BTV, repeated_BTV, scores_BTV)
    scores_BTV = scores_BTV - shaping.frequency_B[:, None, None] * counts_BTV
    scores_BTV = scores_BTV - shaping.presence_B[:, None, None] * (counts_BTV > 0)
    scores_BTV = torch.where(allowed_bits(shaping.allowed_BTW, scores_BTV.shape[-1]), scores_BTV, -torch.inf)
    least_BT1 = _least(share.best(scores_BTV), shaping.min_p_B, temperature_B)
    return torch.where(scores_BTV >= least_BT1, scores_BTV, -torch.inf)


def counts_along(counts_BV: Tensor, drafts_BK: Tensor, offset_1: Tensor | None = None) -> Tensor:
    """Return how often each token is in a row's answer at each position, [B, T, V]: drafts before it included.

    The first token has the id `offset_1` (None: 0).
    """
    vocab, steps = counts_BV.shape[1], drafts_BK.shape[1]
    counts_BTV = counts_BV[:, None].expand(-1, steps + 1, -1)
    ids_V = torch.arange(vocab, dtype=drafts_BK.dtype, device=drafts_BK.device)
    ids_V = ids_V if offset_1 is None else ids_V + offset_1
    positions_T = torch.arange(steps + 1, device=drafts_BK.device)
    for place in range(steps):
        is_draft_BV = drafts_BK[:, place, None] == ids_V
        counts_BTV = counts_BTV + (is_draft_BV[:, None] & (positions_T > place)[:, None]).int()
    return counts_BTV


def allowed_bits(words_BTW: Tensor, vocab: int) -> Tensor:
    """Return the bits of words as bool [B, T, V]; shifts by numbers, because StableHLO has none by tensors."""
    bits = torch.stack([(words_BTW >> bit) & 1 for bit in range(WORD_BITS)], dim=-1)
    return bits.flatten(-2)[..., :vocab] != 0


def log_probs(logits_BTV: Tensor, chosen_BT: Tensor, count: int, share: Share = WHOLE) -> LogProbs:
    """Return the log probabilities of chosen tokens and of the `count` most probable ones; logits as in `shape`."""
    seams, offset_1 = share.seams, share.offset_1
    total_BT1 = torch.logsumexp(logits_BTV, dim=-1, keepdim=True)
    chosen_BT1 = chosen_BT[..., None]
    if offset_1 is None:
        score_BT1 = logits_BTV.gather(-1, chosen_BT1)
        above_BT1 = (logits_BTV > score_BT1).sum(dim=-1, keepdim=True, dtype=torch.int32)
    else:
        total_BT1 = torch.logsumexp(seams.all_gather(total_BT1), dim=-1, keepdim=True)
        own_BT1 = chosen_BT1 - offset_1
        found_BT1 = logits_BTV.gather(-1, own_BT1.clamp(0, share.size - 1))
        is_own_BT1 = (own_BT1 >= 0) & (own_BT1 < share.size)
        score_BT1 = share.best(torch.where(is_own_BT1, found_BT1, -torch.inf))
        above_BT1 = (logits_BTV > score_BT1).sum(dim=-1, keepdim=True, dtype=torch.int32)
        above_BT1 = seams.all_gather(above_BT1).sum(dim=-1, keepdim=True, dtype=torch.int32)
    top_BTN, ids_BTN = highest(logits_BTV, count, seams, offset_1)
    return LogProbs((score_BT1 - total_BT1)[..., 0], above_BT1[..., 0] + 1, top_BTN - total_BT1, ids_BTN.int())


def _least(best_BT1: Tensor, min_p_B: Tensor, temperature_B: Tensor) -> Tensor:
    """Return the lowest score that `min_p` keeps, [B, T, 1]: its probability is `min_p` of the highest one's."""
    distance_B = temperature_B * torch.log(min_p_B.clamp(min=SMALLEST))
    applies_B11 = ((min_p_B > 0) & (temperature_B > 0))[:, None, None]
    return torch.where(applies_B11, best_BT1 + distance_B[:, None, None], -torch.inf)
