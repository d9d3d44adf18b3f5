"""Requests of a server in the slots of a batch. Imports no vLLM.

Each step gets the new, the running and the finished requests, as a scheduler gives them to its worker. The lowest free
slot is filled first, so that a server with few requests runs its smallest bucket.

A step in which a request has rules takes two graphs: its drafts are proposed at the end of the step before, because the
scheduler decides by them what a grammar allows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Choice
from pipeline.runtime.batch import NO_DRAFTS, Batch, Drafts, Row
from pipeline.runtime.draft_length import DraftLengthPolicies
from pipeline.runtime.logprobs import TokenLogProbs, Verified
from pipeline.runtime.prefixes import Prefixes
from pipeline.runtime.prompt_scores import prompt_logprobs
from pipeline.runtime.rules import RuleState


@dataclass
class ServedRequest(Row):
    """A request in a slot; `speculate` is False for a request that excludes drafts."""

    speculate: bool = True
    prompt_logprobs: int | None = None
    """Most probable tokens to report at each position of the prompt; None: report nothing."""
    shared: int = 0
    """Tokens of the prompt that it may share with other requests, as the scheduler counts them."""


@dataclass(frozen=True)
class Step:
    """What a step gave: the tokens of each request, and log probabilities of those that ask for them.

    `logprobs` belong to the tokens, `prompts` to the tokens of new prompts but the first.
    """

    tokens: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogProbs]]
    prompts: dict[str, list[TokenLogProbs]]


def served_request(
    tokens: Iterable[int], choice: Choice, seed: int | None, *, speculate: bool = True, rules: RuleState | None = None,
    prompt_logprobs: int | None = None, shared: int = 0,
) -> ServedRequest:  # fmt: skip
    """Return a request before its first step; without a seed, its tokens are not reproducible."""
    prompt = list(tokens)
    own = secrets.randbits(64) if seed is None else seed % (1 << 64)
    return ServedRequest(
        prompt, len(prompt), own, choice, rules, speculate=speculate, prompt_logprobs=prompt_logprobs, shared=shared
    )


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
        self._prefixes = Prefixes(batch)
        self._slots: dict[str, int] = {}
        self._rows: dict[str, ServedRequest] = {}
        self.planned = 0
        """K of the next step; 0 for a decode step."""

    def drop(self, names: Iterable[str]) -> None:
        """Free the slots of finished or cancelled requests; ignore unknown names."""
        no_string(names, "names", "requests")
        for name in names:
            if name in self._slots:
                slot, row = self._slots.pop(name), self._rows.pop(name)
                self.batch.ended(row)
                self._prefixes.end(slot, row)

    def is_reading(self, name: str) -> bool:
        """Return whether a request's prompt has not been read to its end."""
        row = self._rows[name]
        return row.read < row.prompt and len(row.tokens) == row.prompt

    def step(
        self,
        new: Mapping[str, ServedRequest],
        running: Mapping[str, int],
        allowed: Mapping[str, Tensor] | None = None,
        reading: Mapping[str, int] | None = None,
    ) -> Step:
        """Read prompts and take one step with the requests in `running`; return the tokens of all.

        `new` are requests to take in. `running` gives the largest number of drafts that may count for each request. The
        step drafts `planned` tokens, unless that number is 0 for every request. `allowed` has what grammars allow at
        the positions of a request's step, int32 [drafts + 1, W]. `reading` gives the tokens of a prompt that shall have
        been read after the step, of new requests and of those that were read in part (None: all of the new ones); until
        its prompt is read, a request has no token.
        """
        self._fill_slots(new)
        if reading is None:
            reading = {name: request.prompt for name, request in new.items()}
        whole = [name for name, end in reading.items() if end >= self._rows[name].prompt]
        prompts = self._score_prompts({name: self._rows[name] for name in whole})
        ruled = [name for name in whole if self._rows[name].rules is not None]
        tokens = self._prefill({name: end for name, end in reading.items() if name not in ruled})
        logprobs: dict[str, list[TokenLogProbs]] = {}
        if ruled or any(self._rows[name].rules is not None for name in running):
            verified = self._verify(ruled, running, allowed or {})
            tokens |= {name: each.tokens for name, each in verified.items()}
            logprobs = {name: each.logprobs for name, each in verified.items() if each.logprobs}
        elif running:
            tokens |= self._advance(running)
        for name, emitted in tokens.items():
            row = self._rows[name]
            row.tokens.extend(emitted)
            row.in_draft = min(row.in_draft, row.position)  # the draft has read tokens beyond the limit
        self._plan_next([name for name, emitted in tokens.items() if emitted])
        return Step(tokens, logprobs, prompts)

    def drafts(self, name: str) -> list[int]:
        """Return the drafts of a request's next step; placeholders where the step's own graph proposes them."""
        if self.is_reading(name):
            return []
        return self._rows[name].proposed[: self.planned] or [0] * self.planned

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that were not read, over all requests."""
        return self._prefixes.shared_tokens

    def shared(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of a prompt the slots hold."""
        return self._prefixes.shared(tokens, self._rows_of(self._slots))

    def _fill_slots(self, new: Mapping[str, ServedRequest]) -> None:
        free = [slot for slot in range(self.batch.slots) if slot not in self._slots.values()]
        if len(free) < len(new):
            raise RuntimeError(f"{len(new)} requests for {len(free)} free slots of {self.batch.slots}")
        for name, request in new.items():
            slot = self._prefixes.begin(request, free, self._rows_of(self._slots), request.shared)
            free.remove(slot)
            self._slots[name], self._rows[name] = slot, request

    def _score_prompts(self, new: Mapping[str, ServedRequest]) -> dict[str, list[TokenLogProbs]]:
        asking = {name: request for name, request in new.items() if request.prompt_logprobs is not None}
        if not asking:
            return {}
        most = max(request.prompt_logprobs or 0 for request in asking.values())
        found = prompt_logprobs(self.batch, self._rows_of(asking), most)
        return {name: found[self._slots[name]] for name in asking}

    def _prefill(self, reading: Mapping[str, int]) -> dict[str, list[int]]:
        """Read prompts up to `reading`; return the first token of those that end there, and none of others."""
        rows = self._rows_of(reading)
        after = self.batch.read_to({self._slots[name]: end for name, end in reading.items()}, rows)
        return {
            name: [after[self._slots[name]]] if end >= self._rows[name].prompt else [] for name, end in reading.items()
        }

    def _rows_of(self, names: Iterable[str]) -> dict[int, ServedRequest]:
        return {self._slots[name]: self._rows[name] for name in names}

    def _verify(
        self, new: Iterable[str], running: Mapping[str, int], allowed: Mapping[str, Tensor]
    ) -> dict[str, Verified]:
        """Read new prompts, and verify with them the drafts that were proposed for running requests."""
        if rows := self._rows_of(new):
            self.batch.read(rows)
        drafts = dict.fromkeys(new, NO_DRAFTS)
        for name in (*new, *running):
            proposed = self._rows[name].proposed[: running.get(name, 0)]
            drafts[name] = Drafts(proposed, allowed.get(name))
        given = {self._slots[name]: each for name, each in drafts.items()}
        verified = self.batch.verify(self._rows_of(drafts), given)
        return {name: verified[self._slots[name]] for name in drafts}

    def _advance(self, running: Mapping[str, int]) -> dict[str, list[int]]:
        rows = self._rows_of(running)
        steps = self.planned if any(running.values()) else 0
        emitted = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        return {name: emitted[self._slots[name]][: drafts + 1] for name, drafts in running.items()}

    def _plan_next(self, names: Iterable[str]) -> None:
        """Choose K of the next step; where a request has rules, propose its drafts now."""
        self.planned = self._plan(names)
        rows = self._rows_of(names)
        if self.planned and any(row.rules is not None for row in rows.values()):
            self.batch.propose(rows, self.planned)

    def _plan(self, names: Iterable[str]) -> int:
        """Return K for the next step, chosen from the requests of this one."""
        rows = self._rows_of(names)
        if not rows or (self.speculate_up_to is not None and len(rows) > self.speculate_up_to):
            return 0
        if not all(row.speculate for row in rows.values()):
            return 0
        steps = self.batch.manifest.draft_tokens[0]
        if self._draft_length_policy is not None:
            steps = self.batch.choose_draft_tokens(self._draft_length_policy, rows)
        return steps if steps and self.batch.has_room(rows, steps) else 0
