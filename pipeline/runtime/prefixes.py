"""What slots hold of requests that ended or run: a new request begins after the longest prefix that it shares.

A row's caches depend on its tokens alone, so a shared prefix changes no token. Of a prefix that ends far before what a
slot was written up to, rings no longer hold the last window: it is not shared. The lowest free slot is filled first, as
few rows then run a small bucket; slots that are not needed keep what ended, the longest unused one is given up first.
Recurrent states are those after all tokens of a row, or a few less: only a prompt that begins with these shares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.backends.base import CopyRow
from pipeline.graphs.spec import Ring
from pipeline.runtime.batch import Batch, Row, Rows, common_prefix

LEAST_SHARED = 16
"""Tokens of the shortest prefix that is worth its copy."""

MISSING = 1
"""Tokens of a slot that a prompt need not share to continue its recurrent states (`plan.READ_AGAIN`): the last draft
token of a whole accepted step is not in the caches of a draft model.
"""


@dataclass(frozen=True)
class Shared:
    """The first `count` tokens of a prompt, which a slot holds; None: no slot does."""

    count: int
    slot: int | None


NOTHING = Shared(0, None)


@dataclass(frozen=True)
class Held:
    """Tokens that a slot's caches hold, and the end of all positions that were written there (`Row.written`).

    A prompt has to share the first `least` tokens: recurrent states are those after them.
    """

    tokens: Sequence[int]
    written: int
    least: int = 0

    def shared(self, tokens: Sequence[int], rings: Sequence[Ring]) -> int:
        """Return the length of the prefix that a prompt of these tokens may begin after.

        Its last token is read again, with the window before it.
        """
        count = common_prefix(tokens, self.tokens)
        whole = all(self.written <= ring.slots or self.written - count < ring.back for ring in rings)
        return count if whole and count >= self.least else 0


class Prefixes:
    """The prefixes in a batch's slots. `begin` and `end` are called for every request."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.shared_tokens = 0
        """Prompt tokens that were not read, over all requests."""
        self._held: dict[int, Held] = {}  # what slots hold; the newest is last
        self._least: dict[int, int] = {}  # `Held.least` of what a row began with, by its slot

    def begin(self, row: Row, free: Sequence[int], running: Rows, most: int | None = None) -> int:
        """Return the slot of a new request, one of `free`; its row says how much of the prompt the slot holds.

        At most `most` tokens are shared (None: all that match).
        """
        slot, shared = min(free), self._longest(row.tokens[: row.prompt][:most], running)
        held = None if shared.slot is None else self._holding(running)[shared.slot]
        row.written = 0 if held is None else held.written
        if (copy := self.batch.ranks.copy_row) is not None:
            others = [other for other in free if other not in (slot, shared.slot)]
            self._keep_aside(slot, shared.count if shared.slot == slot else 0, others, copy)
            if shared.slot is not None and shared.slot != slot:
                copy(shared.slot, slot, shared.count)
        elif shared.slot is not None:
            slot = shared.slot
        row.read = row.in_draft = shared.count
        self.shared_tokens += shared.count
        self._held.pop(slot, None)
        self._least[slot] = 0 if held is None else held.least
        return slot

    def end(self, slot: int, row: Row) -> None:
        """Record what a slot holds after its request has ended."""
        self._held.pop(slot, None)
        self._held[slot] = self._held_by(slot, row)

    def shared(self, tokens: Sequence[int], running: Rows) -> int:
        """Return how many tokens of a prompt a request would not have to read."""
        return self._longest(tokens, running).count

    def _longest(self, tokens: Sequence[int], running: Rows) -> Shared:
        """Return the longest prefix of a prompt that a slot holds; that of a running row has to be copied."""
        rings = self.batch.manifest.pair.rings
        found = [Shared(one.shared(tokens, rings), slot) for slot, one in self._holding(running).items()]
        best = max(found, key=lambda one: one.count, default=NOTHING)
        return best if best.count >= LEAST_SHARED else NOTHING

    def _holding(self, running: Rows) -> dict[int, Held]:
        """Return what slots hold: those of running rows only where it can be copied."""
        if self.batch.ranks.copy_row is None:
            return self._held
        return self._held | {slot: self._held_by(slot, row) for slot, row in running.items()}

    def _held_by(self, slot: int, row: Row) -> Held:
        """Return the tokens that both models' caches hold of a row."""
        count = row.position if len(row.tokens) > row.prompt else row.read
        reads_states = self.batch.manifest.draft_kind.reads_target_states  # this draft's caches are never behind
        held = row.tokens[: count if reads_states else min(count, row.in_draft)]
        recurrent = self.batch.manifest.pair.replayed > 0
        return Held(held, row.written, max(self._least[slot], count - MISSING) if recurrent else 0)

    def _keep_aside(self, slot: int, shared: int, others: Sequence[int], copy: CopyRow) -> None:
        """Copy what a slot holds to a free one before it is overwritten, unless all of these were used later.

        Not if the new request shares all but a few tokens.
        """
        held = self._held.get(slot)
        if held is None or len(held.tokens) - shared < LEAST_SHARED or not others:
            return
        ages = {number: age for age, number in enumerate(self._held)}
        other = min(others, key=lambda number: ages.get(number, -1))
        if ages.get(other, -1) < ages[slot]:
            copy(slot, other, len(held.tokens))
            self._held.pop(other, None)
            self._held[other] = held
