"""The number of tokens to draft next, from recent acceptance rates and step costs.

The choice depends on the tokens alone, never on a clock, so a request takes the same steps on every run. A step with K
drafts emits 1 + a + a^2 + ... + a^K tokens where drafts are accepted at rate a (Leviathan et al. 2023); K is
worth it while that gains more than the step costs. Plain decode is K = 0; in it a row's rate drifts back to where rows
start, so a speculative step now and then tests whether the text has become easier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass
class Acceptance:
    """Running acceptance rate of one row's drafts, from the assumed rate `start`."""

    rate: float = START
    drafts: int = 0
    start: float = START

    def record_step(self, accepted: int, drafted: int) -> None:
        """Record a speculative step; drafts after the first rejected draft do not count."""
        for at in range(min(accepted + 1, drafted)):
            self.drafts += 1
            self.rate += max(NEWEST, 1 / (KNOWN + self.drafts)) * ((at < accepted) - self.rate)

    def record_plain_step(self) -> None:
        """Record a decode step."""
        self.rate += DRIFT * (self.start - self.rate)

    def tokens(self, steps: int) -> float:
        """Return the expected tokens of a step with K = `steps`."""
        return sum(self.rate**k for k in range(steps + 1))


@dataclass(frozen=True)
class DraftLengthPolicies:
    """A `DraftLengthPolicy` for each batch bucket, and in it for caches of up to so many tokens.

    Verifying costs more where many rows, or long caches, are read.
    """

    by_shape: Mapping[int, Mapping[int, DraftLengthPolicy]]

    def choose(self, rows: Mapping[int, Acceptance], tokens: int) -> int:
        """Return K of the next step of rows, by their slots, of which the longest has `tokens`; 0 for plain decode."""
        by_tokens = self.by_shape[min(batch for batch in self.by_shape if batch > max(rows))]
        return by_tokens[min(most for most in by_tokens if most >= tokens)].choose(list(rows.values()))


@dataclass(frozen=True)
class DraftLengthPolicy:
    """Chooses K for a batch. `costs`: a step's cost in plain decode steps, by K."""

    costs: Mapping[int, float]

    def choose(self, rows: Sequence[Acceptance]) -> int:
        """Return K of the next step; 0 for plain decode."""
        best = max((0, *self.costs), key=lambda k: sum(row.tokens(k) for row in rows) / self.costs.get(k, 1.0))
        if best == 0:
            for row in rows:
                row.record_plain_step()
        return best
