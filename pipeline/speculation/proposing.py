"""Tokens that a draft proposes, of its states: all at once, or a DSpark draft's one after the other.

Shapes: B rows, T tokens, K draft tokens, H hidden, V vocabulary of the draft, R rank of the Markov head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models import markov
from pipeline.speculation.model import Choose, Model


def masked(last_B: Tensor, masks: int, mask_token: int) -> Tensor:
    """Return each row's last token and as many masks after it: int64 [B, 1 + masks]."""
    last_B1 = last_B[:, None].long()
    if not masks:
        return last_B1
    return torch.cat((last_B1, torch.full_like(last_B1, mask_token).expand(-1, masks)), dim=1)


def proposed(model: Model, hidden_BTH: Tensor, positions_BT: Tensor, choose: Choose) -> Tensor:
    """Return the draft's tokens at positions, int64 [B, T]; a copied token where `choose` has it."""
    return _or_copied(model.next(hidden_BTH, positions_BT, choose), choose)


def in_turn(model: Model, last_B1: Tensor, hidden_BKH: Tensor, positions_BK: Tensor, choose: Choose) -> Tensor:
    """Return a DSpark draft's tokens at positions, int64 [B, K]: each by its logits and the token before it."""
    logits_BKV = model.logits(hidden_BKH, model.limit(choose))
    before = last_B1, markov.first_state(model.config, hidden_BKH)
    drafts: list[Tensor] = []
    for step in range(hidden_BKH.shape[1]):
        logits, hidden, positions = (part[:, step : step + 1] for part in (logits_BKV, hidden_BKH, positions_BK))
        before = model.seams.once(_linked, model, before, logits, hidden, positions, choose.at(step))
        drafts.append(before[0])
    return torch.cat(drafts, dim=1)


def _linked(
    model: Model, before: tuple[Tensor, Tensor | None], logits_B1V: Tensor, hidden_B1H: Tensor, positions_B1: Tensor,
    choose: Choose,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return a token by its logits and by the token and state before it, and the next state."""
    previous_B1, state_B1R = before
    of = (model.config, model.weights, model.seams)
    bias_B1V, state_B1R = markov.bias(*of, model.readable(previous_B1), hidden_B1H, state_B1R)
    return _or_copied(model.chosen(logits_B1V + bias_B1V, positions_B1, choose), choose), state_B1R


def _or_copied(tokens_BT: Tensor, choose: Choose) -> Tensor:
    if choose.copied is None:
        return tokens_BT
    copied_BT = choose.copied.long()
    return torch.where(copied_BT >= 0, copied_BT, tokens_BT)
