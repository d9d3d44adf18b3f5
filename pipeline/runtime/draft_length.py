"""The number of tokens to draft next, from recent acceptance rates and step costs.

The choice depends on the tokens alone, never on a clock, so a request takes the same steps on every run. A step with K
drafts emits 1 + a + a^2 + ... + a^K tokens where drafts are accepted at rate a (Leviathan et al. 2023); K is
worth it while that gains more than the step costs. Plain decode is K = 0; in it a row's rate drifts back to where rows
start, so a speculative step now and then tests whether the text has become easier.

Graphs with a threshold draft the most tokens and verify those of each row that are likely enough. A step then costs
what its verified drafts cost, and a draft is verified if its chance, in tokens, is worth its cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

START = 0.5
"""Acceptance rate that is assumed before a row's first step."""

COPIED = 0.8
"""The same for copied tokens: three tokens that occurred before are mostly followed by the same tokens again."""

KNOWN = 3
"""Number of drafts that the assumption weighs."""

NEWEST = 0.06
"""Least weight of the newest draft in the running acceptance rate."""

DRIFT = 0.002
"""Share by which a decode step moves the rate back to the start: speculation is tried about every 16 steps."""


TYPICAL = 1.5
"""Verified drafts of a step that are assumed before a row's first one, where a threshold leaves some out."""

VERIFYING = 0.7
"""Share of a draft's cost that is its verification; the rest is the draft's own pass, which precedes the decision."""


class NextStep(NamedTuple):
    """The next step: K, 0 for plain decode, and the chance that a draft must have to be verified, 0 for all drafts."""

    steps: int
    threshold: float = 0.0


@dataclass
class Acceptance:
    """Running acceptance rate of one row's drafts, from the assumed rate `start`.

    `verified` and `accepted` are drafts of a step, on average over the newest ones.
    """

    rate: float = START
    drafts: int = 0
    start: float = START
    verified: float = TYPICAL
    accepted: float = -1.0
    steps: int = 0

    def __post_init__(self) -> None:
        if self.accepted < 0:
            self.accepted = self.start * TYPICAL

    def record_step(self, accepted: int, drafted: int) -> None:
        """Record a speculative step; drafts after the first rejected draft do not count."""
        for at in range(min(accepted + 1, drafted)):
            self.drafts += 1
            self.rate += max(NEWEST, 1 / (KNOWN + self.drafts)) * ((at < accepted) - self.rate)
        self.steps += 1
        weight = max(NEWEST, 1 / (KNOWN + self.steps))
        self.verified += weight * (drafted - self.verified)
        self.accepted += weight * (accepted - self.accepted)

    def record_plain_step(self) -> None:
        """Record a decode step."""
        self.rate += DRIFT * (self.start - self.rate)
        self.verified += DRIFT * (TYPICAL - self.verified)
        self.accepted += DRIFT * (self.start * TYPICAL - self.accepted)

    def tokens(self, steps: int) -> float:
        """Return the expected tokens of a step with K = `steps`."""
        return sum(self.rate**k for k in range(steps + 1))


@dataclass(frozen=True)
class DraftLengthPolicies:
    """A `DraftLengthPolicy` for each batch bucket: verifying costs more where many rows are verified."""

    by_batch: Mapping[int, DraftLengthPolicy]

    def choose(self, rows: Mapping[int, Acceptance]) -> NextStep:
        """Return the next step of rows, by their slots."""
        bucket = min(batch for batch in self.by_batch if batch > max(rows))
        return self.by_batch[bucket].choose(list(rows.values()))


@dataclass(frozen=True)
class DraftLengthPolicy:
    """Chooses K for a batch. `costs`: a step's cost in plain decode steps, by K. `has_threshold`: of its graphs."""

    costs: Mapping[int, float]
    has_threshold: bool = False

    def choose(self, rows: Sequence[Acceptance]) -> NextStep:
        """Return the next step."""
        best = self._likely_drafts(rows) if self.has_threshold else NextStep(self._best(rows))
        if best.steps == 0:
            for row in rows:
                row.record_plain_step()
        return best

    def _best(self, rows: Sequence[Acceptance]) -> int:
        return max((0, *self.costs), key=lambda k: sum(row.tokens(k) for row in rows) / self.costs.get(k, 1.0))

    def _likely_drafts(self, rows: Sequence[Acceptance]) -> NextStep:
        """Return a step with the most drafts, and the chance from which on one gains more than it costs."""
        most = max(self.costs)
        one = (self.costs[most] - 1) / most
        verified = sum(row.verified for row in rows) / len(rows)
        tokens = 1 + sum(row.accepted for row in rows) / len(rows)
        gain = tokens / (1 + one * (verified + 1 - VERIFYING))
        return NextStep(most, VERIFYING * one * gain) if gain > 1 else NextStep(0)
