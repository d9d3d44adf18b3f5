"""The kinds of draft behind one interface: a separate model, and heads over the target's hidden states.

A drafter proposes tokens, and receives the target's hidden states and the emitted tokens. The output is always the
target's: a drafter only changes how many tokens a step emits.

Shapes: B rows, T tokens, K draft tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.models import dflash_layers, eagle3_layer, markov
from pipeline.models.decoder import Hidden
from pipeline.models.draft_kind import DraftMethod
from pipeline.models.parallel import Pass, Writes, attend_up_to, plan_writes
from pipeline.models.weights import MASK_HIDDEN
from pipeline.speculation.acceptance import Emitted
from pipeline.speculation.model import Choose, Model, Prompt, Rows
from pipeline.speculation.proposing import in_turn, masked, proposed

TAIL = "tail"
"""State of a draft model, int32 [rows]: the token before a row's last one.

The draft's first pass of a step reads it along with the last token. After a fully accepted step the draft's cache lacks
the last draft token that it proposed; this pass writes it, without an extra pass.
"""

FEATURE = "feature"
"""State of a head, [rows, H]: the target's features at the position before a row's last token."""


class Scores(NamedTuple):
    """Logits of known tokens, float32 [B, T, V], and the experts that routers chose for them (`decoder.Hidden`).

    Those of a head are the experts of the target, whose states it reads.
    """

    logits_BTV: Tensor
    experts_BTLC: Tensor | None


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

    def score(
        self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None = None
    ) -> Scores:  # fmt: skip
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
        live = self.model.of_live(rows.alive_B[:, None])
        for step in range(steps):
            hidden = self.model.hidden(tokens_BT, positions_BT, rows.alive_B, rows.kv).last_BTH[:, -1:]
            positions_BT = positions_BT[:, -1:] + 1
            inputs = (live, hidden, positions_BT, choose.at(step))
            tokens_BT = self.model.seams.once(proposed, *inputs)
            drafts.append(tokens_BT)
        return torch.cat(drafts, dim=1)

    def before_verify(self, rows: Rows) -> None:
        """No-op: as after a decode step, the runtime fills the draft's cache through `score`."""

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:  # noqa: ARG002
        """Set the tail to the token before each row's newest token."""
        history = torch.cat((rows.last_B[:, None].long(), emitted.tokens), dim=1)
        tail_B = history.gather(1, (emitted.count - 1).clamp(0, history.shape[1] - 2)[:, None])[:, 0]
        put(self.model, TAIL, rows.index, tail_B.int(), rows.alive_B)

    def score(
        self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None = None,  # noqa: ARG002
    ) -> Scores:  # fmt: skip
        """Score with the draft alone."""
        logits_BTV, hidden = score(self.model, tokens_BT, position_B, kv, lengths_B)
        return Scores(logits_BTV, hidden.experts_BTLC)


@dataclass(frozen=True)
class Eagle3:
    """A head in the EAGLE-3 convention: at position i it reads the token at i + 1 beside the target's features at i.

    The MTP module of a target is one too. After every phase its caches hold all positions before the last token, so it
    needs no `score` before it speculates.
    """

    model: Model

    def after_prefill(self, prompt: Prompt, states: Hidden) -> None:
        """Write keys and values of the whole prompt; store the features at its end for the next token."""
        features_BTH = self._features(states, prompt.live)
        next_BT = torch.cat((prompt.tokens_BT[:, 1:], prompt.tokens_BT[:, -1:]), dim=1)
        run = Pass(prompt.positions_BT, self.model.state, prompt.writes(self.model, less=1), prompt.attend, prompt.live)
        self._write_cache(next_BT, features_BTH, run)
        last_BH = take(features_BTH, prompt.last)
        put(self.model, FEATURE, prompt.slots_B.long(), last_BH, prompt.active[:, None])

    def after_decode(self, rows: Rows, states: Hidden) -> None:
        """Write keys and values of the previous position, whose next token is known now."""
        self.before_verify(rows)
        put(self.model, FEATURE, rows.index, self._features(states, rows.alive_B[:, None])[:, 0], rows.alive_B[:, None])

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Run one pass per token; after the first, the head's own output replaces the target's features."""
        tokens_B1, features_B1H = rows.last_B[:, None].long(), self._feature(rows)
        positions_B1 = rows.position_B[:, None].long() - 1
        drafts: list[Tensor] = []
        live = self.model.of_live(rows.alive_B[:, None])
        for step in range(steps):
            once = self.model.seams.once
            hidden, features_B1H = once(_run_head, self, rows, tokens_B1, features_B1H, positions_B1)
            tokens_B1 = once(proposed, live, hidden, positions_B1 + 2, choose.at(step))
            drafts.append(tokens_B1)
            positions_B1 = positions_B1 + 1
        return torch.cat(drafts, dim=1)

    def before_verify(self, rows: Rows) -> None:
        """Write keys and values of the previous position, whose next token is known now."""
        positions_B1 = rows.position_B[:, None] - 1
        self._write_cache(rows.last_B[:, None], self._feature(rows), head_pass(self.model, rows, positions_B1))

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:
        """Rewrite keys and values of accepted drafts from the target's features instead of the head's own output."""
        live_BT = index_range(emitted.tokens.shape[1], rows.last_B) < emitted.count[:, None]
        features_BTH = self._features(states, live_BT)
        steps = emitted.tokens.shape[1] - 1
        if steps:
            positions_BK = rows.position_B[:, None] + index_range(steps, rows.last_B)
            keep_BK = index_range(steps, rows.last_B) < emitted.count[:, None] - 1
            tokens_BK = emitted.tokens[:, :-1].clamp(0, self.model.config.vocab - 1)
            self._write_cache(tokens_BK, features_BTH[:, :-1], head_pass(self.model, rows, positions_BK, keep_BK))
        last_BH = take(features_BTH, (emitted.count.long() - 1).clamp(0, steps))
        put(self.model, FEATURE, rows.index, last_BH, rows.alive_B[:, None])

    def score(
        self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None = None
    ) -> Scores:  # fmt: skip
        """Score with target and head. The first token of a sequence has no features before it: its logits are zeros."""
        _, states = score(target, tokens_BT, position_B, kv, lengths_B)
        features_BTH = self._features(states)
        alive_B = position_B < self.model.usable(kv)
        rows = Rows(tokens_BT[:, 0], position_B, alive_B, kv)
        before_BTH = torch.cat((self._feature(rows), features_BTH[:, :-1]), dim=1)
        positions_BT = position_B[:, None] + index_range(tokens_BT.shape[1], tokens_BT) - 1
        hidden, _ = _run_head(self, rows, tokens_BT, before_BTH, positions_BT)
        last_BH = features_BTH[:, -1]
        if lengths_B is not None:  # without lengths, what follows sets it anew
            last_BH = take(features_BTH, (lengths_B.long() - 1).clamp(min=0))
        put(self.model, FEATURE, rows.index, last_BH, alive_B[:, None])
        known_BT1 = (positions_BT >= 0)[..., None]
        return Scores(torch.where(known_BT1, self.model.all_logits(hidden), 0.0), states.experts_BTLC)

    def _features(self, states: Hidden, live_BT: Tensor | None = None) -> Tensor:
        """Project the target's hidden states, of live tokens, to the input of the head's layer: [B, T, H]."""
        model, head = self.model, self.model.config.eagle3
        assert head is not None
        read_BTX = states.last_BTH if head.reads_output else states.taps_BTX
        assert read_BTX is not None
        return eagle3_layer.features(model.config, model.weights, model.seams.of_live(live_BT), read_BTX)

    def _feature(self, rows: Rows) -> Tensor:
        """Return the features before each row's last token: [B, 1, H]."""
        return self.model.state[FEATURE][: rows.last_B.shape[0], None]

    def _write_cache(self, tokens_BT: Tensor, features_BTH: Tensor, run: Pass) -> None:
        """Write keys and values; only a head of several layers attends."""
        model = self.model
        inputs = (model.readable(tokens_BT), features_BTH)
        eagle3_layer.write_cache(model.config, model.weights, model.seams, *inputs, run)


@dataclass(frozen=True)
class PEagle(Eagle3):
    """A P-EAGLE head (arXiv 2602.01469): an EAGLE-3 head that proposes all tokens of a step in one pass.

    Beside the last token it reads masked positions, whose keys and values are replaced after verification.
    """

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Run one pass over the last token with its features and K - 1 masked positions after it."""
        model, head = self.model, self.model.config.eagle3
        assert head is not None
        assert head.mask_token is not None
        tokens_BK, features_BKH = masked(rows.last_B, steps - 1, head.mask_token), self._feature(rows)
        if steps > 1:  # a graph has no empty tensors
            state_11X = model.weights[MASK_HIDDEN][None, None]
            masked_11H = eagle3_layer.features(model.config, model.weights, model.seams, state_11X)
            masked_BKH = masked_11H.expand(rows.last_B.shape[0], steps - 1, -1)
            features_BKH = torch.cat((features_BKH, masked_BKH), dim=1)
        positions_BK = rows.position_B[:, None].long() - 1 + index_range(steps, rows.last_B)
        hidden_BKH, _ = _run_head(self, rows, tokens_BK, features_BKH, positions_BK)
        live = model.of_live(rows.alive_B[:, None].expand_as(positions_BK))
        return proposed(live, hidden_BKH, positions_BK + 2, choose)


@dataclass(frozen=True)
class DFlash:
    """A DFlash draft (arXiv 2602.06036): it denoises a block, the last token and masks after it, in one pass.

    After every phase its caches hold keys and values of the target's states at all positions before the last token;
    those of the block are replaced after verification. It keeps nothing else between steps. A DSpark draft adds a bias
    to the logits of each of the block's tokens, by the token that it proposed before.
    """

    model: Model

    def after_prefill(self, prompt: Prompt, states: Hidden) -> None:
        """Write keys and values of the whole prompt."""
        self._write(states, prompt.positions_BT, prompt.writes(self.model))

    def after_decode(self, rows: Rows, states: Hidden) -> None:
        """Write keys and values of the last token."""
        positions_B1 = rows.position_B[:, None]
        self._write(states, positions_B1, row_writes(self.model, rows, positions_B1))

    def propose(self, rows: Rows, steps: int, choose: Choose) -> Tensor:
        """Run one pass over the block; its last K outputs predict the tokens at the next K positions."""
        model, head = self.model, self.model.config.eagle3
        assert head is not None
        assert head.mask_token is not None
        size = steps + (not head.from_anchor)
        tokens_BT = masked(rows.last_B, size - 1, head.mask_token)
        positions_BT = rows.position_B[:, None].long() + index_range(size, rows.last_B)
        seen_BT = positions_BT.clamp(0, model.usable(rows.kv) - 1)
        attend = attend_up_to(seen_BT, rows.kv)
        live_BT = rows.alive_B[:, None].expand_as(positions_BT)
        run = Pass(positions_BT, model.state, row_writes(model, rows, positions_BT), attend, live_BT)
        inputs = (model.readable(tokens_BT), run, seen_BT[:, -1:].expand_as(seen_BT))
        hidden_BTH = dflash_layers.block_states(model.config, model.weights, model.seams, *inputs)
        answers_BKH = hidden_BTH[:, size - steps :]
        next_BK = rows.position_B[:, None].long() + 1 + index_range(steps, rows.last_B)
        if head.markov is not None:
            return in_turn(model, rows.last_B[:, None].long(), answers_BKH, next_BK, choose)
        return proposed(model.of_live(rows.alive_B[:, None].expand_as(next_BK)), answers_BKH, next_BK, choose)

    def before_verify(self, rows: Rows) -> None:
        """No-op: the caches hold all positions before the last token."""

    def after_verify(self, rows: Rows, emitted: Emitted, states: Hidden) -> None:
        """Write keys and values of the last token and of accepted drafts."""
        positions_BT = rows.position_B[:, None] + index_range(emitted.tokens.shape[1], rows.last_B)
        keep_BT = index_range(emitted.tokens.shape[1], rows.last_B) < emitted.count[:, None]
        self._write(states, positions_BT, row_writes(self.model, rows, positions_BT, keep_BT))

    def score(
        self, target: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None = None
    ) -> Scores:  # fmt: skip
        """Score with target and draft: after each token, the first answer of a block of that token and one mask."""
        model, head = self.model, self.model.config.eagle3
        assert head is not None
        assert head.mask_token is not None
        _, states = score(target, tokens_BT, position_B, kv, lengths_B)
        rows = Rows(tokens_BT[:, 0], position_B, position_B < model.usable(kv), kv)
        positions_BT = position_B[:, None] + index_range(tokens_BT.shape[1], tokens_BT)
        writes = row_writes(model, rows, positions_BT)
        self._write(states, positions_BT, writes)
        both_BT = torch.cat((tokens_BT, torch.full_like(tokens_BT, head.mask_token)), dim=1)
        run = Pass(positions_BT, model.state, writes)
        inputs = (model.readable(both_BT), run, kv)
        hidden_BTH = dflash_layers.pair_states(model.config, model.weights, model.seams, *inputs)
        logits_BTV = model.all_logits(hidden_BTH)
        if head.markov is not None:
            of = (model.config, model.weights, model.seams)
            logits_BTV = logits_BTV + markov.bias(*of, model.readable(tokens_BT), hidden_BTH)[0]
        return Scores(logits_BTV, states.experts_BTLC)

    def _write(self, states: Hidden, positions_BT: Tensor, writes: Writes) -> None:
        model = self.model
        assert states.taps_BTX is not None
        context_BTH = dflash_layers.context(model.config, model.weights, model.seams, states.taps_BTX)
        run = Pass(positions_BT, model.state, writes)
        dflash_layers.write_context(model.config, model.weights, model.seams, context_BTH, run)


def row_writes(model: Model, rows: Rows, positions_BT: Tensor, keep_BT: Tensor | None = None) -> Writes:
    """Return the writes of rows 0..B-1 at positions inside the bucket, where `keep_BT` holds if given."""
    inside_BT = rows.alive_B[:, None] & (positions_BT >= 0) & (positions_BT < model.usable(rows.kv))
    keep_BT = inside_BT if keep_BT is None else inside_BT & keep_BT
    return plan_writes(model.state, rows.index, positions_BT, keep_BT, length=model.length)


def head_pass(model: Model, rows: Rows, positions_BT: Tensor, keep_BT: Tensor | None = None) -> Pass:
    """Return a head's pass over rows 0..B-1 and their caches, which stores tokens where `keep_BT` holds if given."""
    attend = attend_up_to(positions_BT.clamp(0, rows.kv), rows.kv)
    live_BT = rows.alive_B[:, None].expand_as(positions_BT)
    live_BT = live_BT if keep_BT is None else live_BT & keep_BT
    return Pass(positions_BT, model.state, row_writes(model, rows, positions_BT, keep_BT), attend, live_BT)


def _run_head(
    head: Eagle3, rows: Rows, tokens_BT: Tensor, features_BTH: Tensor, positions_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a head's layer over rows 0..B-1 and their caches: the LM head's input and the next features, [B, T, H]."""
    model = head.model
    inputs = (model.readable(tokens_BT), features_BTH)
    run = head_pass(model, rows, positions_BT)
    return eagle3_layer.hidden_states(model.config, model.weights, model.seams, *inputs, run)


DRAFTERS: dict[DraftMethod, Callable[[Model], Drafter]] = {
    "draft_model": DraftModel,
    "eagle3": Eagle3,
    "p_eagle": PEagle,
    "mtp": Eagle3,
    "dflash": DFlash,
    "dspark": DFlash,
}
"""The drafter of each kind of draft."""


def drafter_of(draft: Model) -> Drafter:
    """Return the drafter of a draft's kind."""
    return DRAFTERS[draft.config.draft_kind.method](draft)


def score(
    model: Model, tokens_BT: Tensor, position_B: Tensor, kv: int, lengths_B: Tensor | None = None
) -> tuple[Tensor, Hidden]:  # fmt: skip
    """Return logits float32 [B, T, V] of `tokens_BT` from `position_B` on, and their hidden states.

    Tokens of a row from `lengths_B` on are padding.
    """
    positions_BT = position_B[:, None] + index_range(tokens_BT.shape[1], tokens_BT)
    live_BT = None if lengths_B is None else index_range(tokens_BT.shape[1], tokens_BT) < lengths_B[:, None]
    hidden = model.hidden(tokens_BT, positions_BT, position_B < model.usable(kv), kv, live_BT)
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
