"""How a pass continues recurrent states, so that a row can return to an earlier one after a rejection.

Shapes: B rows, T tokens of the pass, H inputs that a convolution sees before a token, W tokens that can be replayed,
L = H + W kept inputs, N = W + T tokens of the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recurrence:
    """How a pass continues recurrent states, which are those after the first `base` tokens of a row.

    A row keeps the inputs of W tokens from `base` on, and of the H before them, which a convolution sees: L = H + W. A
    pass at a position up to `base` + W replays those before it, so a row can return to any of these positions. Then it
    advances `base` as far as it must to keep the last W tokens, its own included.

    Shapes: N = W + T tokens, of which the last T are the pass's own. `rows_B` int64 are cache rows, `empty_B` bool rows
    that begin; `slots_BL` int64 are the kept inputs before the pass in order, if `held_BL`; `read_BN` bool are tokens
    that change states, `kept_BN` those up to the new base. `stored_BL` int64 are the inputs to keep, of the L + T.
    """

    rows_B: Tensor
    empty_B: Tensor
    slots_BL: Tensor
    held_BL: Tensor
    read_BN: Tensor
    kept_BN: Tensor
    stored_BL: Tensor
    base_B: Tensor


def plan_recurrence(
    bases: Tensor, rows_B: Tensor, start_B: Tensor, keep_BT: Tensor, sizes: tuple[int, int]
) -> Recurrence:
    """Return how `rows_B` continue at positions `start_B` with the first tokens of the pass, where `keep_BT` holds.

    `bases` int32 [rows] are those of all rows, `sizes` H and W. A row without tokens keeps its states as they are.
    """
    history, replayed = sizes
    count_B, start_B = keep_BT.sum(dim=1), start_B.long()
    empty_B = (start_B == 0) & (count_B > 0)
    base_B = torch.where(empty_B, 0, bases[rows_B].long())
    begin_B = torch.where(count_B > 0, start_B, base_B + replayed)
    index_L = torch.arange(history + replayed, device=rows_B.device)
    index_T = torch.arange(keep_BT.shape[1], device=rows_B.device)
    before_BL = begin_B[:, None] - len(index_L) + index_L
    of_log_B1 = (base_B - history)[:, None]
    positions_BN = torch.cat((before_BL[:, history:], begin_B[:, None] + index_T), dim=1)
    read_BN = (positions_BN >= base_B[:, None]) & (positions_BN < (begin_B + count_B)[:, None])
    after_B = torch.maximum(base_B, begin_B + count_B - replayed)
    stored_BL = after_B[:, None] - history + index_L - before_BL[:, :1]
    return Recurrence(
        rows_B,
        empty_B,
        (before_BL - of_log_B1).clamp(0, len(index_L) - 1),
        (before_BL >= of_log_B1) & (before_BL >= 0),
        read_BN,
        read_BN & (positions_BN < after_B[:, None]),
        stored_BL.clamp(0, len(index_L) + len(index_T) - 1),
        after_B.int(),
    )
