"""Accepted drafts by place in a step, beside what teacher forcing says; and what prompt lookup alone would give.

A draft model proposes in a step what it chooses under teacher forcing, as long as its drafts are accepted. A head reads
the target's features at its first place only, later its own output, so teacher forcing is an upper limit there.

Steps in which prompt lookup proposed tokens are left out: their acceptance says nothing about the draft.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.runtime.calls import Generation
from pipeline.runtime.lookup import Lookup
from pipeline.validate.gates.answers import ScoredSequence
from pipeline.validate.limits import FLIP_LIMIT
from pipeline.validate.reference.golden import Golden

OWN_OUTPUT = 0.4
"""Least share of the teacher-forced acceptance that a head keeps at places where it reads its own output."""

LOOKUP_TOKENS = 3
"""Number of tokens that prompt lookup matches, if the recipe has none."""


@dataclass(frozen=True)
class StepPlace:
    """Drafts of one place in a step, of steps that accepted all before: tried, accepted, accepted if teacher-forced.

    `unsure`: tried drafts at which rounding alone changes the draft's choice.
    """

    tried: int = 0
    accepted: int = 0
    forced: int = 0
    unsure: int = 0

    def finding(self, *, own_output: bool, near_tie_rate: float) -> str | None:
        """Return what is wrong with the acceptance at this place, if anything."""
        allowed = 1 + math.ceil(FLIP_LIMIT * self.unsure + near_tie_rate * self.tried)
        least = (OWN_OUTPUT if own_output else 1.0) * self.forced - allowed
        if least <= self.accepted <= self.forced + allowed or (own_output and self.accepted >= least):
            return None
        return f"{self.accepted} of {self.tried} drafts accepted, {self.forced} by teacher forcing"


def places_of(
    sequences: Sequence[ScoredSequence], answers: Sequence[Generation], goldens: Mapping[str, Golden],
    draft_ids: Tensor | None, steps: int, length: int,
) -> list[StepPlace]:  # fmt: skip
    """Return the places 1 to K of the steps that gave the answers, with K = `steps`.

    `goldens` are those of the draft, `draft_ids` the target's ids of a reduced vocabulary. `length` is that of the
    caches: at their end a step has less room than K, and accepts no draft beyond it.
    """
    counts = [[0, 0, 0, 0] for _ in range(steps)]
    for sequence, answer in zip(sequences, answers, strict=True):
        golden = goldens[sequence.name]
        chosen, noisy = golden.baseline.best.long(), golden.noise.best.long()
        proposals = chosen if draft_ids is None else draft_ids[chosen]
        for last, emitted in _own_steps(sequence, answer):
            for place in range(min(emitted, steps, length - 1 - last)):
                at = last + 1 + place
                if at >= len(sequence.tokens):
                    break
                agrees = int(proposals[at - 1]) == sequence.tokens[at]
                unsure = int(chosen[at - 1]) != int(noisy[at - 1])
                for number, value in enumerate((1, emitted > place + 1, agrees, unsure)):
                    counts[place][number] += value
    return [StepPlace(*of) for of in counts]


def _own_steps(sequence: ScoredSequence, answer: Generation) -> Iterator[tuple[int, int]]:
    """Yield steps without copies: the index of the token before, and how many tokens were emitted."""
    last = sequence.prompt  # the first new token is from prefill
    for emitted, copied in zip(answer.emitted_per_step, answer.copied_per_step, strict=True):
        if not copied:
            yield last, emitted
        last += emitted


def findings_of(places: Sequence[StepPlace], *, is_head: bool, near_tie_rate: float) -> tuple[str, ...]:
    """Return a finding for each place whose acceptance teacher forcing does not explain."""
    found = (
        (number, place.finding(own_output=is_head and number > 1, near_tie_rate=near_tie_rate))
        for number, place in enumerate(places, 1)
    )
    return tuple(f"place {number} of a step: {what}" for number, what in found if what)


def lookup_alone(sequences: Sequence[ScoredSequence], size: int | None, steps: int) -> float:
    """Return the tokens per step that prompt lookup alone would give for these answers."""
    emitted = count = 0
    for sequence in sequences:
        tokens, lookup, at = sequence.tokens, Lookup(), sequence.prompt + 1
        while at < len(tokens):
            copies = lookup.find(tokens[:at], size or LOOKUP_TOKENS, steps)
            accepted = 0
            while accepted < min(len(copies), len(tokens) - at) and copies[accepted] == tokens[at + accepted]:
                accepted += 1
            at += accepted + 1
            emitted, count = emitted + accepted + 1, count + 1
    return emitted / max(count, 1)
