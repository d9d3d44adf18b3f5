"""The two kinds of draft behind one interface: a model of its own, and a head over the target's hidden states.

A drafter proposes tokens, and is told what the target read and emitted. Whatever it proposes, the output is the
target's: a drafter only decides how many tokens a step emits.

Shapes: B rows, T tokens, K draft tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.models import eagle3_layer
from pipeline.models.decoder import Hidden
from pipeline.models.parallel import Caches, Writes, attend_up_to, plan_writes
from pipeline.speculation.acceptance import Emitted
from pipeline.speculation.model import Choose, Model, Prompt, Rows
from pipeline.speculation.sampling import Candidates, certain

TAIL = "tail"
"""State of a draft model, int32 [rows]: the token before a row's last one.

The draft's first pass of a step reads it along with the last token. After a fully accepted step the draft has never
seen the last draft token it proposed; this pass fills that hole in its cache, at no extra pass.
"""

FEATURE = "feature"
"""State of a head, [rows, H]: the target's features at the position before a row's last token."""


class Drafter(Protocol):
    """What the phases ask of a draft."""

    def after_prefill(self, prompt: Prompt, seen: Hidden) -> None:
        """The target has read these prompts."""
        ...

    def after_decode(self, rows: Rows, seen: Hidden) -> None:
        """The target has read each row's last token."""
        ...

    def propose(self, rows: Rows, steps: int, choose: Choose) -> tuple[Tensor, list[Candidates]]:
        """Draft `steps` tokens: int64 [B, K] in the target's ids, and, when sampling, the distribution of each."""
        ...

    def after_verify(self, rows: Rows, emitted: Emitted, seen: Hidden) -> None:
        """The target has read each row's last token and the drafts, and emitted these tokens."""
        ...

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:
        """Teacher forcing: logits float32 [B, T, D] of the draft's vocabulary; fills the caches."""
        ...


def drafter_of(draft: Model) -> Drafter:
    """The drafter that a draft's config calls for."""
    return DraftModel(draft) if draft.config.eagle3 is None else Eagle3(draft)


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary, with caches of its own."""

    model: Model

    def after_prefill(self, prompt: Prompt, seen: Hidden) -> None:  # noqa: ARG002 - only a head reads the states
        """Read the prompts, too."""
        self.model.read(prompt)
        last_B = prompt.tokens_BT.gather(1, prompt.last[:, None])[:, 0]
        put(self.model, TAIL, prompt.slots_B.long(), last_B.int(), prompt.active)

    def after_decode(self, rows: Rows, seen: Hidden) -> None:  # noqa: ARG002
        """Keep the tail only: the runtime lets the draft catch up through `score` before it speculates again."""
        put(self.model, TAIL, rows.index, rows.last_B.int(), rows.alive_B)

    def propose(self, rows: Rows, steps: int, choose: Choose) -> tuple[Tensor, list[Candidates]]:
        """One pass a token; the first reads two."""
        tail_B = self.model.state[TAIL][: rows.last_B.shape[0]]
        tokens_BT = torch.stack((tail_B, rows.last_B), dim=1).long()
        positions_BT = (rows.position_B[:, None] + count(2, rows.last_B) - 1).clamp(0, rows.kv)
        drafts: list[Tensor] = []
        dists: list[Candidates] = []
        for step in range(steps):
            hidden = self.model.hidden(tokens_BT, positions_BT, rows.alive_B, rows.kv).last_BTH[:, -1:]
            tokens_BT, found = _proposed(self.model, hidden, choose, step)
            drafts.append(tokens_BT)
            dists += [] if found is None else [found]
            positions_BT = positions_BT[:, -1:] + 1
        return torch.cat(drafts, dim=1), dists

    def after_verify(self, rows: Rows, emitted: Emitted, seen: Hidden) -> None:  # noqa: ARG002
        """The token before the newest one of each row is the new tail."""
        history = torch.cat((rows.last_B[:, None].long(), emitted.tokens), dim=1)
        tail_B = history.gather(1, (emitted.count - 1).clamp(0, history.shape[1] - 2)[:, None])[:, 0]
        put(self.model, TAIL, rows.index, tail_B.int(), rows.alive_B)

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:  # noqa: ARG002
        """The draft alone."""
        return score(self.model, tokens_BT, position_B, kv)[0]


@dataclass(frozen=True)
class Eagle3:
    """A head in the EAGLE-3 convention: at position i it reads the token at i + 1 beside the target's features at i.

    Its caches always reach to the position before the last token, whatever the phase, so it never has to catch up.
    """

    model: Model

    def after_prefill(self, prompt: Prompt, seen: Hidden) -> None:
        """Keys and values of the whole prompt; the features at its end wait for the token that follows."""
        features_BTH = self._features(seen)
        next_BT = torch.cat((prompt.tokens_BT[:, 1:], prompt.tokens_BT[:, -1:]), dim=1)
        keep_BT = (prompt.positions_BT < prompt.lengths_B[:, None] - 1) & prompt.active[:, None]
        writes = plan_writes(self.model.state, prompt.slots_B, prompt.positions_BT, keep_BT)
        self._remember(next_BT, features_BTH, prompt.positions_BT, writes)
        last_BH = at(features_BTH, prompt.last)
        put(self.model, FEATURE, prompt.slots_B.long(), last_BH, prompt.active[:, None])

    def after_decode(self, rows: Rows, seen: Hidden) -> None:
        """Keys and values of the position before, whose token is known now."""
        positions_B1 = rows.position_B[:, None] - 1
        self._remember(rows.last_B[:, None], self._feature(rows), positions_B1, self._writes(rows, positions_B1))
        put(self.model, FEATURE, rows.index, self._features(seen)[:, 0], rows.alive_B[:, None])

    def propose(self, rows: Rows, steps: int, choose: Choose) -> tuple[Tensor, list[Candidates]]:
        """One pass a token; after the first, the head's own output stands in for the target's features."""
        tokens_B1, features_B1H = rows.last_B[:, None].long(), self._feature(rows)
        positions_B1 = rows.position_B[:, None].long() - 1
        drafts: list[Tensor] = []
        dists: list[Candidates] = []
        for step in range(steps):
            hidden, features_B1H = self._run(rows, tokens_B1, features_B1H, positions_B1)
            tokens_B1, found = _proposed(self.model, hidden, choose, step)
            drafts.append(tokens_B1)
            dists += [] if found is None else [found]
            positions_B1 = positions_B1 + 1
        return torch.cat(drafts, dim=1), dists

    def after_verify(self, rows: Rows, emitted: Emitted, seen: Hidden) -> None:
        """Replace what was drafted from the head's own output by what the target saw, where it was accepted."""
        features_BTH = self._features(seen)
        steps = emitted.tokens.shape[1] - 1
        if steps:
            positions_BK = rows.position_B[:, None] + count(steps, rows.last_B)
            keep_BK = count(steps, rows.last_B) < emitted.count[:, None] - 1
            writes = self._writes(rows, positions_BK, keep_BK)
            tokens_BK = emitted.tokens[:, :-1].clamp(0, self.model.config.vocab - 1)
            self._remember(tokens_BK, features_BTH[:, :-1], positions_BK, writes)
        last_BH = at(features_BTH, (emitted.count.long() - 1).clamp(0, steps))
        put(self.model, FEATURE, rows.index, last_BH, rows.alive_B[:, None])

    def score(self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> Tensor:
        """Target and head together. The first token of a sequence has no features before it: its logits are zeros."""
        _, seen = score(target, tokens_BT, position_B, kv)
        features_BTH = self._features(seen)
        alive_B = position_B < self.model.usable(kv)
        rows = Rows(tokens_BT[:, 0], position_B, alive_B, kv)
        before_BTH = torch.cat((self._feature(rows), features_BTH[:, :-1]), dim=1)
        positions_BT = position_B[:, None] + count(tokens_BT.shape[1], tokens_BT) - 1
        hidden, _ = self._run(rows, tokens_BT, before_BTH, positions_BT)
        put(self.model, FEATURE, rows.index, features_BTH[:, -1], alive_B[:, None])
        known_BT1 = (positions_BT >= 0)[..., None]
        return torch.where(known_BT1, self.model.all_logits(hidden), 0.0)

    def _features(self, seen: Hidden) -> Tensor:
        """What the target saw, as the head's layer takes it: [B, T, H]."""
        assert seen.taps_BTX is not None
        model = self.model
        return eagle3_layer.features(model.config, model.weights, model.seams, seen.taps_BTX)

    def _feature(self, rows: Rows) -> Tensor:
        """The features before each row's last token: [B, 1, H]."""
        return self.model.state[FEATURE][: rows.last_B.shape[0], None]

    def _writes(self, rows: Rows, positions_BT: Tensor, keep_BT: Tensor | None = None) -> Writes:
        inside_BT = rows.alive_B[:, None] & (positions_BT >= 0) & (positions_BT < self.model.usable(rows.kv))
        keep_BT = inside_BT if keep_BT is None else inside_BT & keep_BT
        return plan_writes(self.model.state, rows.index, positions_BT, keep_BT)

    def _run(self, rows: Rows, tokens_BT: Tensor, features_BTH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The layer over rows 0..B-1 and their caches."""
        model = self.model
        attend = attend_up_to(positions_BT.clamp(0, rows.kv), rows.kv)
        writes = self._writes(rows, positions_BT)
        inputs = (model.readable(tokens_BT), features_BTH, positions_BT, Caches(model.state, writes, attend))
        return eagle3_layer.hidden_states(model.config, model.weights, model.seams, *inputs)

    def _remember(self, tokens_BT: Tensor, features_BTH: Tensor, positions_BT: Tensor, writes: Writes) -> None:
        model = self.model
        inputs = (model.readable(tokens_BT), features_BTH, positions_BT, Caches(model.state, writes))
        eagle3_layer.remember(model.config, model.weights, model.seams, *inputs)


def _proposed(model: Model, hidden_B1H: Tensor, choose: Choose, step: int) -> tuple[Tensor, Candidates | None]:
    """The draft's token of a step, int64 [B, 1], and its distribution; a copied token where there is one."""
    tokens_B1, found = model.next(hidden_B1H, choose, step)
    if choose.copied is None:
        return tokens_B1, found
    copied_B1 = choose.copied[:, step : step + 1].long()
    tokens_B1 = torch.where(copied_B1 >= 0, copied_B1, tokens_B1)
    return tokens_B1, None if found is None else certain(found, copied_B1)


def score(model: Model, tokens_BT: Tensor, position_B: Tensor, kv: int) -> tuple[Tensor, Hidden]:
    """Logits float32 [B, T, V] of `tokens_BT` placed at `position_B` onwards, and the states they came from."""
    positions_BT = position_B[:, None] + count(tokens_BT.shape[1], tokens_BT)
    hidden = model.hidden(tokens_BT, positions_BT, position_B < model.usable(kv), kv)
    return model.all_logits(hidden.last_BTH), hidden


def put(draft: Model, name: str, rows_B: Tensor, values: Tensor, keep: Tensor) -> None:
    """Store a value for each row where `keep` holds."""
    draft.seams.put_row(draft.state, name, rows_B, torch.where(keep, values, draft.state[name][rows_B]))


def at(features_BTH: Tensor, place_B: Tensor) -> Tensor:
    """One position of each row: [B, H]."""
    return features_BTH.gather(1, place_B[:, None, None].expand(-1, 1, features_BTH.shape[-1]))[:, 0]


def count(size: int, like: Tensor) -> Tensor:
    """0 .. size - 1 on the device of `like`."""
    return torch.arange(size, device=like.device)
