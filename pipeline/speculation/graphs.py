"""The four phases of a pair as pure functions: prefill, decode, speculate, score.

Each is traced once per bucket and compiled. State (`State` of both models) is updated through `Seams.write`; nothing
else is mutated. Rows are independent: each has its own position, and an inactive row changes nothing.

Shapes: B rows, T tokens, S attended cache length, K draft tokens, V vocabulary. All integer inputs are int32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import OFFSET, Attend, Weights, attend_where, hidden_states, logits
from pipeline.models.parallel import Seams, State, Writes, plan_writes
from pipeline.speculation.acceptance import Emitted, accept_greedy, accept_stochastic
from pipeline.speculation.sampling import Candidates, Sampling, candidates, draw, greedy

TAIL = "tail"
"""Draft state, int32 [rows]: the token before a row's last one.

The draft's first pass of a step reads it along with the last token. After a fully accepted step the draft has never
seen the last draft token it proposed; this pass fills that hole in its cache, at no extra pass.
"""


@dataclass(frozen=True)
class Model:
    """One model of a pair inside a graph: its config, this rank's weights, its caches and its backend seams.

    `partner_vocab` is set for a draft whose `vocab_size` is padded otherwise than its target's. It then never proposes
    an id that the target lacks, and reads one that it lacks itself as its own last id: a worse guess, the same output.
    """

    config: ModelConfig
    weights: Weights
    state: State
    seams: Seams
    partner_vocab: int | None = None

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, active_B: Tensor, kv: int) -> Tensor:
        """Run rows 0..B-1 over their caches; a query sees keys at or before its own position."""
        rows_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
        writes = plan_writes(self.state, rows_B, positions_BT, active_B[:, None] & (positions_BT < self.usable(kv)))
        keys_S = torch.arange(kv, device=tokens_BT.device)
        attend = attend_where(keys_S <= positions_BT[..., None], kv)
        return self.run(tokens_BT, positions_BT, writes, attend)

    def run(self, tokens_BT: Tensor, positions_BT: Tensor, writes: Writes, attend: Attend) -> Tensor:
        """All layers over tokens of the pair's common tokenizer: [B, T, H]."""
        if self.partner_vocab is not None and self.partner_vocab > self.config.vocab:
            tokens_BT = tokens_BT.clamp(0, self.config.vocab - 1)
        return hidden_states(self.config, self.weights, self.seams, tokens_BT, positions_BT, self.state, writes, attend)

    def usable(self, kv: int) -> int:
        """Positions of a bucket that hold tokens; the last of the whole cache is scratch (see `plan_writes`)."""
        return min(kv, self.state["k.0"].shape[2] - 1)

    @property
    def proposable(self) -> int:
        """Ids of the output vocabulary that the pair has in common."""
        return min(self.config.out_vocab, self.partner_vocab or self.config.out_vocab)

    def logits(self, hidden_BTH: Tensor, known: int | None = None) -> Tensor:
        """This rank's logits, float32 [B, T, V / tp]; -inf from the id `known` on."""
        return logits(self.config, self.weights, self.seams, hidden_BTH, known)

    def all_logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits of the whole vocabulary, float32 [B, T, V]."""
        return self.seams.all_gather(self.logits(hidden_BTH))[..., : self.config.out_vocab]

    def greedy(self, hidden_BTH: Tensor) -> Tensor:
        """Argmax over the ids that the pair has in common, int64 [B, T], as ids of the target."""
        return self.to_target(greedy(self.logits(hidden_BTH, self.proposable), self.seams, self.weights.get(OFFSET)))

    def candidates(self, hidden_BTH: Tensor, sampling: Sampling, keep: int | None) -> Candidates:
        """The distribution to sample from, as ids of the target."""
        found = candidates(self.all_logits(hidden_BTH)[..., : self.proposable], sampling, keep, self.seams)
        return Candidates(self.to_target(found.ids_BTN), found.probs_BTN)

    def to_target(self, ids: Tensor) -> Tensor:
        """Map ids of a reduced vocabulary to the target's (EAGLE-3 convention, `d2t` offsets)."""
        return ids if self.config.draft_vocab is None else ids + self.weights["d2t"][ids]


@dataclass(frozen=True)
class Choose:
    """How a graph picks tokens: greedily, or from `sampling` with `uniforms` float32 and the best `keep` candidates."""

    sampling: Sampling | None = None
    uniforms: Tensor | None = None
    keep: int | None = field(default=None)


def prefill(
    target: Model, draft: Model, tokens_BT: Tensor, lengths_B: Tensor, slots_B: Tensor, choose: Choose
) -> Tensor:
    """Fill both models' caches from empty rows; returns the first new token, int32 [B] (-1 for rows of length 0).

    Shapes: tokens_BT right-padded, lengths_B real tokens per row, slots_B distinct cache rows, uniforms [B, 1].
    """
    active_B = lengths_B > 0
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    positions_BT = positions_T.expand_as(tokens_BT)
    causal = attend_where((positions_T <= positions_T[:, None])[None], kv=0)
    for model in (draft, target):
        keep_BT = active_B[:, None] & (positions_T < model.usable(tokens_BT.shape[1]))
        writes = plan_writes(model.state, slots_B, positions_BT, keep_BT)
        hidden = model.run(tokens_BT, positions_BT, writes, causal)
    last_B11 = (lengths_B.long() - 1).clamp(0, tokens_BT.shape[1] - 1)[:, None, None]
    hidden = hidden.gather(1, last_B11.expand(-1, 1, hidden.shape[-1]))
    last_token_B = tokens_BT.gather(1, last_B11[:, :, 0])[:, 0]
    _remember(draft, slots_B.long(), last_token_B, active_B)
    return torch.where(active_B, _next(target, hidden, choose)[:, 0], -1).int()


def decode(
    target: Model, draft: Model, last_B: Tensor, position_B: Tensor, active_B: Tensor, kv: int, choose: Choose
) -> Tensor:
    """One token per row from the target alone: int32 [B], -1 for inactive rows.

    The draft's caches are not written; only its tail is kept, and the runtime lets the draft catch up through `score`
    before it speculates again.
    Shapes: last_B, position_B int32 [B], active_B bool [B], uniforms [B, 1].
    """
    alive_B = active_B & (position_B < target.usable(kv))
    hidden = target.hidden(last_B[:, None], position_B[:, None], alive_B, kv)
    _remember(draft, torch.arange(last_B.shape[0], device=last_B.device), last_B, alive_B)
    return torch.where(alive_B, _next(target, hidden, choose)[:, 0], -1).int()


def speculate(
    target: Model,
    draft: Model,
    last_B: Tensor,
    position_B: Tensor,
    active_B: Tensor,
    kv: int,
    steps: int,
    choose: Choose,
) -> tuple[Tensor, Tensor]:
    """Propose `steps` tokens with the draft, verify them in one pass of the target: 1 to K+1 tokens per row.

    Returns tokens int32 [B, K+1] padded with -1, and count int32 [B] (0 for inactive rows). Near the end of the cache
    fewer drafts count, so that nothing is written past S.
    Shapes: last_B, position_B int32 [B], active_B bool [B], uniforms [B, 2K+1]: K draws of the draft, K acceptances,
    one last token.
    """
    alive_B = active_B & (position_B < target.usable(kv))
    rows_B = torch.arange(last_B.shape[0], device=last_B.device)
    drafts_BK, draft_dists = _propose(draft, last_B, position_B, alive_B, kv, steps, choose)
    tokens_BT = torch.cat((last_B[:, None].long(), drafts_BK), dim=1)
    hidden = target.hidden(tokens_BT, position_B[:, None] + _range(steps + 1, last_B), alive_B, kv)
    room_B = target.usable(kv) - 1 - position_B
    if choose.sampling is None or choose.uniforms is None:
        emitted = accept_greedy(drafts_BK, target.greedy(hidden), room_B, alive_B)
    else:
        dist = target.candidates(hidden, choose.sampling, choose.keep)
        emitted = accept_stochastic(
            drafts_BK, _stack(draft_dists), dist, choose.uniforms[:, steps:], room_B, alive_B, target.config.vocab
        )
    _remember(draft, rows_B, _before_last(last_B, emitted), alive_B)
    return emitted.tokens.int(), emitted.count.int()


def score(model: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:
    """Teacher forcing: logits float32 [B, T, V] of `tokens_BT` placed at `position_B` onwards; fills the cache."""
    positions_BT = position_B[:, None] + _range(tokens_BT.shape[1], tokens_BT)
    active_B = position_B < model.usable(kv)
    return model.all_logits(model.hidden(tokens_BT, positions_BT, active_B, kv))


def _propose(
    draft: Model, last_B: Tensor, position_B: Tensor, alive_B: Tensor, kv: int, steps: int, choose: Choose
) -> tuple[Tensor, list[Candidates]]:
    """Draft `steps` tokens: int64 [B, K] in the target's ids, and, when sampling, the distribution of each."""
    tail_B = draft.state[TAIL][: last_B.shape[0]]
    tokens_BT = torch.stack((tail_B, last_B), dim=1).long()
    positions_BT = (position_B[:, None] + _range(2, last_B) - 1).clamp(0, kv)
    drafts: list[Tensor] = []
    dists: list[Candidates] = []
    for step in range(steps):
        hidden = draft.hidden(tokens_BT, positions_BT, alive_B, kv)[:, -1:]
        if choose.sampling is None or choose.uniforms is None:
            token_B1 = draft.greedy(hidden)
        else:
            dists.append(draft.candidates(hidden, choose.sampling, choose.keep))
            token_B1 = draw(dists[-1], choose.uniforms[:, step : step + 1])
        drafts.append(token_B1)
        tokens_BT, positions_BT = token_B1, positions_BT[:, -1:] + 1
    return torch.cat(drafts, dim=1), dists


def _next(target: Model, hidden_B1H: Tensor, choose: Choose) -> Tensor:
    """The target's next token, int64 [B, 1]."""
    if choose.sampling is None or choose.uniforms is None:
        return target.greedy(hidden_B1H)
    return draw(target.candidates(hidden_B1H, choose.sampling, choose.keep), choose.uniforms)


def _stack(dists: list[Candidates]) -> Candidates:
    return Candidates(torch.cat([d.ids_BTN for d in dists], dim=1), torch.cat([d.probs_BTN for d in dists], dim=1))


def _before_last(last_B: Tensor, emitted: Emitted) -> Tensor:
    """The token before the newest one of each row."""
    history = torch.cat((last_B[:, None].long(), emitted.tokens), dim=1)
    return history.gather(1, (emitted.count - 1).clamp(0, history.shape[1] - 2)[:, None])[:, 0]


def _remember(draft: Model, rows_B: Tensor, tokens_B: Tensor, active_B: Tensor) -> None:
    kept_B = torch.where(active_B, tokens_B.int(), draft.state[TAIL][rows_B])
    draft.seams.put_row(draft.state, TAIL, rows_B, kept_B)


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)
