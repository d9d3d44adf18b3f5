"""The four phases of a pair as pure functions: prefill, decode, speculate, score.

Each is traced once per bucket and compiled. State (`State` of both models) is updated through `Seams.write`; nothing
else is mutated. Rows are independent: each has its own position, and an inactive row changes nothing.

Shapes: B rows, T tokens, S attended cache length, K draft tokens, V vocabulary. All integer inputs are int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.speculation.acceptance import accept_greedy, accept_stochastic
from pipeline.speculation.drafters import Drafter, at, count
from pipeline.speculation.model import Choose, Model, Prompt, Rows
from pipeline.speculation.sampling import Candidates


def prefill(
    target: Model, drafter: Drafter, tokens_BT: Tensor, lengths_B: Tensor, slots_B: Tensor, choose: Choose
) -> Tensor:
    """Fill both models' caches from empty rows; returns the first new token, int32 [B] (-1 for rows of length 0).

    Shapes: tokens_BT right-padded, lengths_B real tokens per row, slots_B distinct cache rows, uniforms [B, 1].
    """
    prompt = Prompt(tokens_BT, count(tokens_BT.shape[1], tokens_BT).expand_as(tokens_BT), lengths_B, slots_B)
    seen = target.read(prompt)
    drafter.after_prefill(prompt, seen)
    token_B1, _ = target.next(at(seen.last_BTH, prompt.last)[:, None], choose)
    return torch.where(prompt.active, token_B1[:, 0], -1).int()


def decode(target: Model, drafter: Drafter, rows: Rows, choose: Choose) -> Tensor:
    """One token per row from the target alone: int32 [B], -1 for inactive rows.

    Shapes: uniforms [B, 1].
    """
    seen = target.hidden(rows.last_B[:, None], rows.position_B[:, None], rows.alive_B, rows.kv)
    drafter.after_decode(rows, seen)
    return torch.where(rows.alive_B, target.next(seen.last_BTH, choose)[0][:, 0], -1).int()


def speculate(
    target: Model,
    drafter: Drafter,
    rows: Rows,
    steps: int,
    choose: Choose,
) -> tuple[Tensor, Tensor]:
    """Propose `steps` tokens with the draft, verify them in one pass of the target: 1 to K+1 tokens per row.

    Returns tokens int32 [B, K+1] padded with -1, and count int32 [B] (0 for inactive rows). Near the end of the cache
    fewer drafts count, so that nothing is written past S.
    Shapes: uniforms [B, 2K+1]: K draws of the draft, K acceptances,
    one last token.
    """
    drafts_BK, draft_dists = drafter.propose(rows, steps, choose)
    tokens_BT = torch.cat((rows.last_B[:, None].long(), drafts_BK), dim=1)
    positions_BT = rows.position_B[:, None] + count(steps + 1, rows.last_B)
    seen = target.hidden(tokens_BT, positions_BT, rows.alive_B, rows.kv)
    room_B = target.usable(rows.kv) - 1 - rows.position_B
    if choose.sampling is None or choose.uniforms is None:
        emitted = accept_greedy(drafts_BK, target.greedy(seen.last_BTH), room_B, rows.alive_B)
    else:
        dist = target.candidates(seen.last_BTH, choose.sampling, choose.keep)
        draws = choose.uniforms[:, steps:]
        emitted = accept_stochastic(
            drafts_BK, _stack(draft_dists), dist, draws, room_B, rows.alive_B, target.config.vocab
        )
    drafter.after_verify(rows, emitted, seen)
    return emitted.tokens.int(), emitted.count.int()


def _stack(dists: list[Candidates]) -> Candidates:
    return Candidates(torch.cat([d.ids_BTN for d in dists], dim=1), torch.cat([d.probs_BTN for d in dists], dim=1))
