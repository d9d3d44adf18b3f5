"""Accept or reject draft tokens, so that a step's output is exactly the target's. Pure functions on tensors.

Greedy: accept the longest prefix that equals the target's own argmax. Stochastic: speculative sampling of Leviathan et
al. (2023) and Chen et al. (2023), accept with min(1, p/q), else resample from the normalised positive part of p - q.

Shapes: B rows, K draft tokens, N target candidates, M draft candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.speculation.sampling import Candidates, pick


@dataclass(frozen=True)
class Emitted:
    """Result of a step: tokens int64 [B, K+1] padded with -1, count int64 [B] (0 for inactive rows)."""

    tokens: Tensor
    count: Tensor


@dataclass(frozen=True)
class Drafts:
    """Proposed tokens int64 [B, K], and the distributions that they are drawn from, [B, K, M]."""

    tokens_BK: Tensor
    dist: Candidates


def accept_greedy(draft_BK: Tensor, target_BT: Tensor, room_B: Tensor, active_B: Tensor) -> Emitted:
    """Keep the prefix of `draft_BK` that matches `target_BT` [B, K+1], then the target's next token.

    At most `room_B` drafts are accepted: the cache has no positions for more.
    """
    matches_BK = draft_BK == target_BT[:, :-1]
    return _emit(matches_BK, target_BT, room_B, active_B)


def accept_stochastic(
    drafts: Drafts, target_dist: Candidates, uniforms: Tensor, room_B: Tensor, active_B: Tensor, vocab: int
) -> Emitted:
    """Apply speculative sampling to truncated distributions.

    Shapes: target_dist [B, K+1, N], uniforms float [B, K+1]: K acceptance draws, then one for the last token.
    """
    draft_BK, draft_dist = drafts.tokens_BK, drafts.dist
    steps = draft_BK.shape[1]
    p_BK = _probability(target_dist, draft_BK, steps)
    q_BK = torch.where(draft_dist.ids_BTN == draft_BK[..., None], draft_dist.probs_BTN, 0.0).sum(-1)
    accepted_BK = uniforms[:, :steps] * q_BK < p_BK
    count_B = _accepted(accepted_BK, room_B)
    replacement_B = _replacement(draft_dist, target_dist, count_B, room_B, uniforms[:, steps], vocab)
    last = torch.arange(steps + 1, device=draft_BK.device)
    padded = torch.cat((draft_BK, draft_BK[:, -1:]), dim=1)
    tokens = torch.where(last == count_B[:, None], replacement_B[:, None], padded)
    return _padded(tokens, count_B + 1, active_B)


def _replacement(
    q: Candidates, p: Candidates, count_B: Tensor, room_B: Tensor, uniform_B: Tensor, vocab: int
) -> Tensor:
    """Draw the token after the accepted prefix: from the residual where a draft is rejected, else from p."""
    steps = q.ids_BTN.shape[1]
    step_B11 = count_B[:, None, None]
    ids_BN = p.ids_BTN.gather(1, step_B11.expand(-1, 1, p.ids_BTN.shape[-1]))[:, 0]
    p_BN = p.probs_BTN.gather(1, step_B11.expand(-1, 1, p.probs_BTN.shape[-1]))[:, 0]
    draft_B11 = step_B11.clamp(0, steps - 1)
    q_ids_BM = q.ids_BTN.gather(1, draft_B11.expand(-1, 1, q.ids_BTN.shape[-1]))[:, 0]
    q_probs_BM = q.probs_BTN.gather(1, draft_B11.expand(-1, 1, q.probs_BTN.shape[-1]))[:, 0]
    q_BN = lookup(q_ids_BM, q_probs_BM, ids_BN, vocab)
    rejected_B = (count_B < steps) & (count_B < room_B)
    residual_BN = (p_BN - q_BN).clamp(min=0.0)
    # p <= q everywhere means p == q: only rounding can reject a draft then, and p replaces the empty residual.
    usable_B = rejected_B & (residual_BN.sum(-1) > 0)
    weights_BN = torch.where(usable_B[:, None], residual_BN, p_BN)
    index_B1 = pick(weights_BN[:, None], uniform_B[:, None])[:, 0]
    return ids_BN.gather(1, index_B1)[:, 0]


def lookup(ids_BM: Tensor, values_BM: Tensor, ids_BN: Tensor, vocab: int) -> Tensor:
    """Return the values of `ids_BN` in the sparse rows (`ids_BM`, `values_BM`), 0 where absent: [B, N]."""
    dense_BV = torch.zeros(ids_BM.shape[0], vocab, dtype=values_BM.dtype, device=values_BM.device)
    return dense_BV.scatter(1, ids_BM, values_BM).gather(1, ids_BN)


def _probability(dist: Candidates, tokens_BK: Tensor, steps: int) -> Tensor:
    ids, probs = dist.ids_BTN[:, :steps], dist.probs_BTN[:, :steps]
    return torch.where(ids == tokens_BK[..., None], probs, 0.0).sum(-1)


def _accepted(matches_BK: Tensor, room_B: Tensor) -> Tensor:
    """Return the length of the accepted prefix, int64 [B]."""
    steps = matches_BK.shape[1]
    position_K = torch.arange(steps, dtype=torch.int32, device=matches_BK.device)
    allowed_BK = matches_BK & (position_K < room_B[:, None])
    return torch.where(allowed_BK, steps, position_K).amin(dim=1).long()


def _emit(matches_BK: Tensor, tokens_BT: Tensor, room_B: Tensor, active_B: Tensor) -> Emitted:
    return _padded(tokens_BT, _accepted(matches_BK, room_B) + 1, active_B)


def _padded(tokens: Tensor, count_B: Tensor, active_B: Tensor) -> Emitted:
    count_B = torch.where(active_B, count_B, 0)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return Emitted(torch.where(position < count_B[:, None], tokens, -1), count_B)
