"""Drafts of a step, and which of them are worth a check: those whose chance reaches the threshold of their row.

The chance of a draft is the probability that the draft gives its likeliest token, times that of the drafts before it.
The target's choices do not depend on drafts: leaving some out changes how many tokens a step emits, and nothing else.

Shapes: B rows, T tokens, K draft tokens, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.speculation.model import Choose, Model, Rows

COPIED = 0.8
"""Chance of a copied token: three tokens that occurred before are mostly followed by the same tokens again."""


class Proposal(NamedTuple):
    """Drafts of a step: int64 [B, K] in the target's ids, and which are worth a check, bool [B, K] (None: all).

    Those of a row that are worth it are its first ones.
    """

    tokens_BK: Tensor
    worth_BK: Tensor | None = None


class Proposed(NamedTuple):
    """Drafts, int64 [B, T], and the chance of each, float32 [B, T]; None if any is verified."""

    tokens_BT: Tensor
    chance_BT: Tensor | None


def proposed(model: Model, hidden_BTH: Tensor, positions_BT: Tensor, choose: Choose, alive_B: Tensor) -> Proposed:
    """Return the draft's tokens at positions of live rows; a copied token where `choose` has it."""
    model = model.of_live(alive_B[:, None].expand_as(positions_BT))
    logits_BTV = model.scores(hidden_BTH, choose)
    tokens_BT, chance_BT = model.chosen(logits_BTV, positions_BT, choose), None
    if choose.threshold_B is not None:
        chance_BT = (logits_BTV.amax(-1) - logits_BTV.logsumexp(-1)).exp()
    if choose.copied is None:
        return Proposed(tokens_BT, chance_BT)
    copied_BT = choose.copied.long()
    chance_BT = None if chance_BT is None else torch.where(copied_BT >= 0, COPIED, chance_BT)
    return Proposed(torch.where(copied_BT >= 0, copied_BT, tokens_BT), chance_BT)


def together(model: Model, hidden_BTH: Tensor, positions_BT: Tensor, choose: Choose, rows: Rows) -> Proposal:
    """Return drafts that one pass gave."""
    found = proposed(model, hidden_BTH, positions_BT, choose, rows.alive_B)
    if found.chance_BT is None or choose.threshold_B is None:
        return Proposal(found.tokens_BT)
    worth_BK = found.chance_BT.cumprod(dim=1) >= choose.threshold_B[:, None]
    return Proposal(found.tokens_BT, worth_BK & rows.alive_B[:, None])


class Chain:
    """Drafts that are proposed one after another. `alive_B` are the rows whose next draft may be worth a check."""

    def __init__(self, rows: Rows, choose: Choose) -> None:
        self.alive_B = rows.alive_B
        self._threshold_B = choose.threshold_B
        self._chance_B1: Tensor | None = None
        self._tokens: list[Tensor] = []
        self._worth: list[Tensor] = []

    def add(self, found: Proposed) -> Tensor:
        """Add the next draft of each row; return it, int64 [B, 1]."""
        self._tokens.append(found.tokens_BT)
        if found.chance_BT is not None and self._threshold_B is not None:
            self._chance_B1 = found.chance_BT if self._chance_B1 is None else self._chance_B1 * found.chance_BT
            self.alive_B = self.alive_B & (self._chance_B1[:, 0] >= self._threshold_B)
            self._worth.append(self.alive_B[:, None])
        return found.tokens_BT

    def proposal(self) -> Proposal:
        """Return all drafts."""
        return Proposal(torch.cat(self._tokens, dim=1), torch.cat(self._worth, dim=1) if self._worth else None)
