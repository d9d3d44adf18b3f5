"""Requests of a server in the slots of a batch. Imports no vLLM.

Every step is told who is new, who goes on and who is gone, as a scheduler tells its worker; slots are filled from the
lowest, so that a quiet server runs its smallest bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from pipeline.graphs.arguments import Choice
from pipeline.runtime.batch import Batch, Row
from pipeline.runtime.draft_length import DraftLengthPolicies


@dataclass
class Request(Row):
    """A request in a slot; `speculate` is its own wish."""

    speculate: bool = True


def request(tokens: Iterable[int], choice: Choice, seed: int | None, *, speculate: bool = True) -> Request:
    """A request before its first step; without a seed, its draws are nobody's to repeat."""
    prompt = list(tokens)
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    return Request(prompt, len(prompt), generator, choice, speculate=speculate)


class Requests:
    """The requests that a worker runs.

    `most` is the largest number of rows that speculate together; more decode plainly, since verifying then costs
    more than it saves.
    """

    def __init__(self, batch: Batch, most: int | None = None) -> None:
        self.batch = batch
        self.most = most
        self._draft_length_policy: DraftLengthPolicies | None = batch.draft_length_policy()
        self._slots: dict[str, int] = {}
        self._rows: dict[str, Request] = {}
        self.planned = 0
        """K of the next step; 0 for plain decode."""

    def drop(self, names: Iterable[str]) -> None:
        """Free the slots of requests that are finished, cancelled or unknown."""
        for name in names:
            self._slots.pop(name, None)
            self._rows.pop(name, None)

    def step(self, new: Mapping[str, Request], going: Mapping[str, int]) -> dict[str, list[int]]:
        """Prefill `new` requests and take one step with those that go on; returns their tokens.

        `going` gives each request the most drafts that may count for it; the step drafts what was planned, unless
        nobody has room for a draft.
        """
        tokens = {name: [token] for name, token in self._prefill(new).items()}
        if going:
            tokens |= self._advance(going)
        for name, found in tokens.items():
            row = self._rows[name]
            row.tokens.extend(found)
            row.in_draft = min(row.in_draft, row.position)  # the draft has read tokens that a limit cut off
        self.planned = self._plan(tokens)
        return tokens

    def _prefill(self, new: Mapping[str, Request]) -> dict[str, int]:
        if not new:
            return {}
        free = (slot for slot in range(self.batch.slots) if slot not in self._slots.values())
        slots = dict(zip(new, free, strict=False))
        if len(slots) < len(new):
            raise RuntimeError(f"{len(new)} requests for {len(slots)} free slots of {self.batch.slots}")
        self._slots |= slots
        self._rows |= new
        first = self.batch.prefill({slot: new[name] for name, slot in slots.items()})
        return {name: first[slot] for name, slot in slots.items()}

    def _advance(self, going: Mapping[str, int]) -> dict[str, list[int]]:
        rows = {self._slots[name]: self._rows[name] for name in going}
        steps = self.planned if any(going.values()) else 0
        found = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        return {name: found[self._slots[name]][: most + 1] for name, most in going.items()}

    def _plan(self, names: Iterable[str]) -> int:
        """K for those that took part now: they most likely take part next."""
        rows = {self._slots[name]: self._rows[name] for name in names}
        if not rows or (self.most is not None and len(rows) > self.most):
            return 0
        if not all(row.speculate for row in rows.values()):
            return 0
        steps = self.batch.manifest.draft_tokens[0]
        if self._draft_length_policy is not None and all(row.choice.temperature == 0 for row in rows.values()):
            steps = self._draft_length_policy.choose(self.batch.acceptance(rows))
        return steps if steps and self.batch.has_room(rows, steps) else 0
