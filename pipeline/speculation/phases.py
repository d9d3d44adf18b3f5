"""The phases of a pair as pure functions: prefill, decode, speculate, propose, verify; `drafters.score` is another.

`speculate` is `propose` and `verify` in one graph. The two are separate where the caller shapes the target's scores by
the drafts: a grammar allows other tokens after each of them.

Each is traced and compiled once per bucket. State (`State` of both models) is updated through `Seams.write`; nothing
else is mutated. Rows are independent: each has its own position, and an inactive row changes no state.

Shapes: B rows, T tokens, S attended cache length, K draft tokens, V vocabulary. All integer inputs are int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.speculation.acceptance import Emitted, accept
from pipeline.speculation.drafters import Drafter, index_range, take
from pipeline.speculation.model import Choose, Model, Prompt, Rows
from pipeline.speculation.shaping import LogProbs


def prefill(target: Model, drafter: Drafter, prompt: Prompt, choose: Choose) -> Tensor:
    """Fill both models' caches; return the token after each prompt, int32 [B] (-1 for rows of length 0).

    A chunk of a prompt begins with the last token of the chunk before it, which is read again: so a head has the
    target's features of that position, and a row keeps nothing between chunks but its caches.
    """
    states = target.read(prompt)
    drafter.after_prefill(prompt, states)
    last_B1H, target = take(states.last_BTH, prompt.last)[:, None], target.of_live(prompt.active[:, None])
    token_B1 = target.next(last_B1H, prompt.following[:, None], choose)
    return torch.where(prompt.active, token_B1[:, 0], -1).int()


def decode(target: Model, drafter: Drafter, rows: Rows, choose: Choose) -> Tensor:
    """Generate one token per row with the target alone: int32 [B], -1 for inactive rows."""
    rows = target.within(rows)
    states = target.hidden(rows.last_B[:, None], rows.position_B[:, None], rows.alive_B, rows.kv)
    drafter.after_decode(rows, states)
    target = target.of_live(rows.alive_B[:, None])
    token_B1 = target.next(states.last_BTH, rows.position_B[:, None] + 1, choose)
    return torch.where(rows.alive_B, token_B1[:, 0], -1).int()


def speculate(target: Model, drafter: Drafter, rows: Rows, steps: int, choose: Choose) -> tuple[Tensor, Tensor]:
    """Propose `steps` tokens with the draft, verify them in one pass of the target: 1 to K+1 tokens per row.

    Returns tokens int32 [B, K+1] padded with -1, and count int32 [B] (0 for inactive rows). Near the end of the cache
    fewer drafts are accepted, so that nothing is written past S.
    """
    rows = target.within(rows)
    emitted, _ = _verified(target, drafter, rows, drafter.propose(rows, steps, choose), choose)
    return emitted.tokens.int(), emitted.count.int()


def propose(drafter: Drafter, rows: Rows, steps: int, choose: Choose) -> Tensor:
    """Propose `steps` tokens with the draft: int32 [B, K], -1 for inactive rows. Changes the draft's caches alone."""
    rows = drafter.model.within(rows)
    return torch.where(rows.alive_B[:, None], drafter.propose(rows, steps, choose), -1).int()


def verify(
    target: Model, drafter: Drafter, rows: Rows, drafts_BK: Tensor, choose: Choose
) -> tuple[Tensor, Tensor, LogProbs]:
    """Verify given drafts, int32 [B, K] with -1 for none: as `speculate`, and log probabilities at K+1 positions."""
    rows = target.within(rows)
    drafter.before_verify(rows)
    emitted, logprobs = _verified(target, drafter, rows, drafts_BK, choose)
    assert logprobs is not None
    return emitted.tokens.int(), emitted.count.int(), logprobs


def _verified(
    target: Model, drafter: Drafter, rows: Rows, drafts_BK: Tensor, choose: Choose
) -> tuple[Emitted, LogProbs | None]:
    tokens_BT = torch.cat((rows.last_B[:, None].long(), drafts_BK.int().clamp(min=0).long()), dim=1)
    positions_BT = rows.position_B[:, None] + index_range(tokens_BT.shape[1], rows.last_B)
    states = target.hidden(tokens_BT, positions_BT, rows.alive_B, rows.kv)
    room_B = target.usable(rows.kv) - 1 - rows.position_B
    logprobs, target = None, target.of_live(rows.alive_B[:, None].expand_as(positions_BT))
    if choose.shaping is None:
        chosen_BT = target.next(states.last_BTH, positions_BT + 1, choose)
    else:
        chosen_BT, logprobs = target.next_shaped(states.last_BTH, positions_BT + 1, drafts_BK, choose)
    emitted = accept(drafts_BK, chosen_BT, room_B, rows.alive_B)
    drafter.after_verify(rows, emitted, states)
    return emitted, logprobs
