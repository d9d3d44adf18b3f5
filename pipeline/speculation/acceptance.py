"""Accept or reject draft tokens, so that a step's output is exactly the target's. Pure functions on tensors.

The target's own choice at each position, greedy or sampled, does not depend on the draft. The longest prefix of drafts
that equals it is accepted.

Shapes: B rows, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Emitted:
    """Result of a step: tokens int64 [B, K+1] padded with -1, count int64 [B] (0 for inactive rows)."""

    tokens: Tensor
    count: Tensor


def accept(draft_BK: Tensor, target_BT: Tensor, room_B: Tensor, active_B: Tensor) -> Emitted:
    """Keep the prefix of `draft_BK` that matches `target_BT` [B, K+1], then the target's next token.

    At most `room_B` drafts are accepted: the cache has no positions for more.
    """
    steps = draft_BK.shape[1]
    position_K = torch.arange(steps, dtype=torch.int32, device=draft_BK.device)
    allowed_BK = (draft_BK == target_BT[:, :-1]) & (position_K < room_B[:, None])
    accepted_B = torch.where(allowed_BK, steps, position_K).amin(dim=1).long()
    count_B = torch.where(active_B, accepted_B + 1, 0)
    position = torch.arange(steps + 1, device=draft_BK.device)
    return Emitted(torch.where(position < count_B[:, None], target_BT, -1), count_B)
