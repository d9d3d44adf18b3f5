"""The two kinds of draft behind one interface: a separate model, and a head over the target's hidden states.

A drafter proposes tokens, and receives the target's hidden states and the emitted tokens. The output is always the
target's: a drafter only changes how many tokens a step emits.

Shapes: B rows, T tokens, K draft tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.models import eagle3_layer
from pipeline.models.decoder import Hidden
from pipeline.models.draft_kind import DraftMethod
from pipeline.models.parallel import Pass, Writes, attend_up_to, plan_writes
from pipeline.speculation.acceptance import Emitted
from pipeline.speculation.model import Choose, Model, Prompt, Rows

TAIL = "tail"
"""State of a draft model, int32 [rows]: the token before a row's last one.

The draft's first pass of a step reads it along with the last token. After a fully accepted step the draft's cache lacks
the last draft token that it proposed; this pass writes it, without an extra pass.
"""

FEATURE = "feature"
"""State of a head, [rows, H]: the target's features at the position before a row's last token."""


class Drafter(Protocol):
    """Interface of a draft for the phases."""

    @property
    def model(self) -> Model:
        """The draft itself, with its caches."""
        ...

    def after_prefill(self, prompt: Prompt, states: Hidden) -> None:
        """Update the draft's state after the target has read these prompts."""
        ...

    def after_decode(self, rows: Rows, states: Hidden) -> None:
        """Update the draft's state after the target has read each row's last token."""
        ...

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Draft `steps` tokens: int64 [B, K] in the target's ids. When sampling, with the noise of their positions."""
        ...

    def before_verify(self, rows: Rows) -> None:
        """Update the draft's state before given drafts are verified: it may not have proposed any in this step."""
        ...

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:
        """Update the draft's state after the target has read the last token and the drafts, and emitted tokens."""
        ...

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:
        """Return logits of known tokens, float32 [B, T, D] of the draft's vocabulary, and fill the caches."""
        ...


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary, with its own caches."""

    model: Model

    def after_prefill(self, prompt: Prompt, states: Hidden) -> None:  # noqa: ARG002 - only a head reads the states
        """Read the prompts with the draft."""
        self.model.read(prompt)
        last_B = prompt.tokens_BT.gather(1, prompt.last[:, None])[:, 0]
        put(self.model, TAIL, prompt.slots_B.long(), last_B.int(), prompt.active)

    def after_decode(self, rows: Rows, states: Hidden) -> None:  # noqa: ARG002
        """Update the tail only: the runtime fills the draft's cache through `score` before it speculates again."""
        put(self.model, TAIL, rows.index, rows.last_B.int(), rows.alive_B)

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Run one pass per token; the first pass reads two tokens."""
        tail_B = self.model.state[TAIL][: rows.last_B.shape[0]]
        tokens_BT = torch.stack((tail_B, rows.last_B), dim=1).long()
        positions_BT = (rows.position_B[:, None] + index_range(2, rows.last_B) - 1).clamp(0, rows.kv)
        drafts: list[Tensor] = []
        for step in range(steps):
            hidden = self.model.hidden(tokens_BT, positions_BT, rows.alive_B, rows.kv).last_BTH[:, -1:]
            positions_BT = positions_BT[:, -1:] + 1
            tokens_BT = self.model.seams.once(_proposed, self.model, hidden, positions_BT, choose.at(step))
            drafts.append(tokens_BT)
        return torch.cat(drafts, dim=1)

    def before_verify(self, rows: Rows) -> None:
        """No-op: as after a decode step, the runtime fills the draft's cache through `score`."""

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:  # noqa: ARG002
        """Set the tail to the token before each row's newest token."""
        history = torch.cat((rows.last_B[:, None].long(), emitted.tokens), dim=1)
        tail_B = history.gather(1, (emitted.count - 1).clamp(0, history.shape[1] - 2)[:, None])[:, 0]
        put(self.model, TAIL, rows.index, tail_B.int(), rows.alive_B)

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:  # noqa: ARG002
        """Score with the draft alone."""
        return score(self.model, tokens_BT, position_B, kv)[0]


@dataclass(frozen=True)
class Eagle3:
    """A head in the EAGLE-3 convention: at position i it reads the token at i + 1 beside the target's features at i.

    After every phase its caches hold all positions before the last token, so it needs no `score` before it speculates.
    """

    model: Model

    def after_prefill(self, prompt: Prompt, states: Hidden) -> None:
        """Write keys and values of the whole prompt; store the features at its end for the next token."""
        features_BTH = self._features(states)
        next_BT = torch.cat((prompt.tokens_BT[:, 1:], prompt.tokens_BT[:, -1:]), dim=1)
        keep_BT = (prompt.positions_BT < prompt.lengths_B[:, None] - 1) & prompt.active[:, None]
        writes = plan_writes(self.model.state, prompt.slots_B, prompt.positions_BT, keep_BT)
        self._write_cache(next_BT, features_BTH, prompt.positions_BT, writes)
        last_BH = take(features_BTH, prompt.last)
        put(self.model, FEATURE, prompt.slots_B.long(), last_BH, prompt.active[:, None])

    def after_decode(self, rows: Rows, states: Hidden) -> None:
        """Write keys and values of the previous position, whose next token is known now."""
        self.before_verify(rows)
        put(self.model, FEATURE, rows.index, self._features(states)[:, 0], rows.alive_B[:, None])

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Run one pass per token; after the first, the head's own output replaces the target's features."""
        tokens_B1, features_B1H = rows.last_B[:, None].long(), self._feature(rows)
        positions_B1 = rows.position_B[:, None].long() - 1
        drafts: list[Tensor] = []
        for step in range(steps):
            once = self.model.seams.once
            hidden, features_B1H = once(_run_head, self, rows, tokens_B1, features_B1H, positions_B1)
            tokens_B1 = once(_proposed, self.model, hidden, positions_B1 + 2, choose.at(step))
            drafts.append(tokens_B1)
            positions_B1 = positions_B1 + 1
        return torch.cat(drafts, dim=1)

    def before_verify(self, rows: Rows) -> None:
        """Write keys and values of the previous position, whose next token is known now."""
        positions_B1 = rows.position_B[:, None] - 1
        self._write_cache(rows.last_B[:, None], self._feature(rows), positions_B1, self.writes(rows, positions_B1))

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:
        """Rewrite keys and values of accepted drafts from the target's features instead of the head's own output."""
        features_BTH = self._features(states)
        steps = emitted.tokens.shape[1] - 1
        if steps:
            positions_BK = rows.position_B[:, None] + index_range(steps, rows.last_B)
            keep_BK = index_range(steps, rows.last_B) < emitted.count[:, None] - 1
            writes = self.writes(rows, positions_BK, keep_BK)
            tokens_BK = emitted.tokens[:, :-1].clamp(0, self.model.config.vocab - 1)
            self._write_cache(tokens_BK, features_BTH[:, :-1], positions_BK, writes)
        last_BH = take(features_BTH, (emitted.count.long() - 1).clamp(0, steps))
        put(self.model, FEATURE, rows.index, last_BH, rows.alive_B[:, None])

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:
        """Score with target and head. The first token of a sequence has no features before it: its logits are zeros."""
        _, states = score(target, tokens_BT, position_B, kv)
        features_BTH = self._features(states)
        alive_B = position_B < self.model.usable(kv)
        rows = Rows(tokens_BT[:, 0], position_B, alive_B, kv)
        before_BTH = torch.cat((self._feature(rows), features_BTH[:, :-1]), dim=1)
        positions_BT = position_B[:, None] + index_range(tokens_BT.shape[1], tokens_BT) - 1
        hidden, _ = _run_head(self, rows, tokens_BT, before_BTH, positions_BT)
        put(self.model, FEATURE, rows.index, features_BTH[:, -1], alive_B[:, None])
        known_BT1 = (positions_BT >= 0)[..., None]
        return torch.where(known_BT1, self.model.all_logits(hidden), 0.0)

    def _features(self, states: Hidden) -> Tensor:
        """Project the target's hidden states to the input of the head's layer: [B, T, H]."""
        model, head = self.model, self.model.config.eagle3
        assert head is not None
        read_BTX = states.last_BTH if head.reads_output else states.taps_BTX
        assert read_BTX is not None
        return eagle3_layer.features(model.config, model.weights, model.seams, read_BTX)

    def _feature(self, rows: Rows) -> Tensor:
        """Return the features before each row's last token: [B, 1, H]."""
        return self.model.state[FEATURE][: rows.last_B.shape[0], None]

    def writes(self, rows: Rows, positions_BT: Tensor, keep_BT: Tensor | None = None) -> Writes:
        """Return the writes of rows 0..B-1 at positions inside the bucket, where `keep_BT` holds if given."""
        inside_BT = rows.alive_B[:, None] & (positions_BT >= 0) & (positions_BT < self.model.usable(rows.kv))
        keep_BT = inside_BT if keep_BT is None else inside_BT & keep_BT
        return plan_writes(self.model.state, rows.index, positions_BT, keep_BT)

    def _write_cache(self, tokens_BT: Tensor, features_BTH: Tensor, positions_BT: Tensor, writes: Writes) -> None:
        model = self.model
        inputs = (model.readable(tokens_BT), features_BTH)
        run = Pass(positions_BT, model.state, writes)
        eagle3_layer.write_cache(model.config, model.weights, model.seams, *inputs, run)


def _run_head(
    head: Eagle3, rows: Rows, tokens_BT: Tensor, features_BTH: Tensor, positions_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a head's layer over rows 0..B-1 and their caches: the LM head's input and the next features, [B, T, H]."""
    model = head.model
    attend = attend_up_to(positions_BT.clamp(0, rows.kv), rows.kv)
    run = Pass(positions_BT, model.state, head.writes(rows, positions_BT), attend)
    inputs = (model.readable(tokens_BT), features_BTH)
    return eagle3_layer.hidden_states(model.config, model.weights, model.seams, *inputs, run)


DRAFTERS: dict[DraftMethod, Callable[[Model], Drafter]] = {"draft_model": DraftModel, "eagle3": Eagle3}
"""The drafter of each kind of draft."""


def drafter_of(draft: Model) -> Drafter:
    """Return the drafter of a draft's kind."""
    return DRAFTERS[draft.config.draft_kind.method](draft)


def _proposed(model: Model, hidden_B1H: Tensor, positions_B1: Tensor, choose: Choose) -> Tensor:
    """Return the draft's tokens at positions, int64 [B, 1]; a copied token where `choose` has it."""
    tokens_B1 = model.next(hidden_B1H, positions_B1, choose)
    if choose.copied is None:
        return tokens_B1
    copied_B1 = choose.copied.long()
    return torch.where(copied_B1 >= 0, copied_B1, tokens_B1)


def score(model: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> tuple[Tensor, Hidden]:
    """Return logits float32 [B, T, V] of `tokens_BT` from `position_B` on, and their hidden states."""
    positions_BT = position_B[:, None] + index_range(tokens_BT.shape[1], tokens_BT)
    hidden = model.hidden(tokens_BT, positions_BT, position_B < model.usable(kv), kv)
    return model.all_logits(hidden.last_BTH), hidden


def put(draft: Model, name: str, rows_B: Tensor, values: Tensor, keep: Tensor) -> None:
    """Store a value for each row where `keep` holds."""
    draft.seams.put_row(draft.state, name, rows_B, torch.where(keep, values, draft.state[name][rows_B]))


def take(features_BTH: Tensor, index_B: Tensor) -> Tensor:
    """Select one position of each row: [B, H]."""
    return features_BTH.gather(1, index_B[:, None, None].expand(-1, 1, features_BTH.shape[-1]))[:, 0]


def index_range(size: int, like: Tensor) -> Tensor:
    """Return 0 .. size - 1 on the device of `like`."""
    return torch.arange(size, device=like.device)
