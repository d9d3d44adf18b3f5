"""Requests of a server in the slots of a batch. Imports no vLLM.

Each step gets the new, the running and the finished requests, as a scheduler gives them to its worker. The lowest free
slot is filled first, so that a server with few requests runs its smallest bucket.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Choice
from pipeline.runtime.batch import Batch, Row
from pipeline.runtime.draft_length import DraftLengthPolicies


@dataclass
class ServedRequest(Row):
    """A request in a slot; `speculate` is False for a request that excludes drafts."""

    speculate: bool = True


def served_request(tokens: Iterable[int], choice: Choice, seed: int | None, *, speculate: bool = True) -> ServedRequest:
    """Return a request before its first step; without a seed, its tokens are not reproducible."""
    prompt = list(tokens)
    own = secrets.randbits(64) if seed is None else seed % (1 << 64)
    return ServedRequest(prompt, len(prompt), own, choice, speculate=speculate)


def wants_drafts(value: object) -> bool:
    """Return what a request's extra argument `speculate` says.

    Raises:
        InputError: the value is neither true nor false.

    """
    words = {True: True, False: False, "1": True, "0": False, "true": True, "false": False}
    found = words.get(value.lower() if isinstance(value, str) else value) if isinstance(value, str | int) else None
    if found is None:
        raise InputError(f"found {value!r}", where="speculate", fix="use true or false")
    return found


class RequestSlots:
    """The requests that a worker runs, each in a slot of the batch.

    `speculate_up_to` is the largest number of rows that speculate together: with more rows a decode step is faster.
    """

    def __init__(self, batch: Batch, speculate_up_to: int | None = None) -> None:
        self.batch = batch
        self.speculate_up_to = speculate_up_to
        self._draft_length_policy: DraftLengthPolicies | None = batch.draft_length_policy()
        self._slots: dict[str, int] = {}
        self._rows: dict[str, ServedRequest] = {}
        self.planned = 0
        """K of the next step; 0 for a decode step."""

    def drop(self, names: Iterable[str]) -> None:
        """Free the slots of finished or cancelled requests; ignore unknown names."""
        no_string(names, "names", "requests")
        for name in names:
            self._slots.pop(name, None)
            self._rows.pop(name, None)

    def step(self, new: Mapping[str, ServedRequest], running: Mapping[str, int]) -> dict[str, list[int]]:
        """Prefill `new` requests and take one step with those in `running`; return the tokens of all.

        `running` gives the largest number of drafts that may count for each request. The step drafts `planned` tokens,
        unless that number is 0 for every request.
        """
        tokens = {name: [token] for name, token in self._prefill(new).items()}
        if running:
            tokens |= self._advance(running)
        for name, emitted in tokens.items():
            row = self._rows[name]
            row.tokens.extend(emitted)
            row.in_draft = min(row.in_draft, row.position)  # the draft has read tokens beyond the limit
        self.planned = self._plan(tokens)
        return tokens

    def _prefill(self, new: Mapping[str, ServedRequest]) -> dict[str, int]:
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

    def _advance(self, running: Mapping[str, int]) -> dict[str, list[int]]:
        rows = {self._slots[name]: self._rows[name] for name in running}
        steps = self.planned if any(running.values()) else 0
        emitted = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        return {name: emitted[self._slots[name]][: drafts + 1] for name, drafts in running.items()}

    def _plan(self, names: Iterable[str]) -> int:
        """Return K for the next step, chosen from the requests of this one."""
        rows = {self._slots[name]: self._rows[name] for name in names}
        if not rows or (self.speculate_up_to is not None and len(rows) > self.speculate_up_to):
            return 0
        if not all(row.speculate for row in rows.values()):
            return 0
        steps = self.batch.manifest.draft_tokens[0]
        if self._draft_length_policy is not None:
            steps = self._draft_length_policy.choose(self.batch.acceptance(rows))
        return steps if steps and self.batch.has_room(rows, steps) else 0
