"""The result of examining a draft, as data and as a verdict in one line. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pipeline.records import Record

ALIKE = 0.9
"""Agreement of drafts with answers to other prompts, above which the target says nearly the same everywhere."""

Verdict = Literal["agrees", "another reading", "chance", "below the stated rates"]


class Measured(Record):
    """Agreement of one reading: right drafts at each place, given that those before were right, and what follows."""

    reading: str
    by_place: tuple[float, ...]
    tokens_per_step: float
    better: bool = False


class Coverage(Record):
    """The draft's vocabulary: its size, the target's, and the share of the answers' tokens that it can propose."""

    tokens: int
    of: int
    answers: float


class Expected(Record):
    """What follows for one K: tokens per step, the recipe's cost of a step, and the speed-up of both."""

    draft_tokens: int
    tokens_per_step: float
    step_cost: float | None = None
    speed_up: float | None = None


class DraftReport(Record):
    """How a draft agrees with its target, under teacher forcing on greedy answers to prompts of the recipe.

    `setting` is what the recipe would say for the better reading, if there is one.
    """

    recipe: str
    read: str
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    prompts: int
    chains: int
    chance: float
    vocabulary: Coverage
    current: Measured
    others: tuple[Measured, ...]
    expected: tuple[Expected, ...]
    setting: str | None
    verdict: Verdict
    stated: tuple[float, ...] = ()

    @property
    def line(self) -> str:
        """The verdict in one line."""
        first, per_step = self.current.by_place[0], self.current.tokens_per_step
        now = f"{first:.0%} of first drafts are right, {per_step:.2f} tokens per step"
        if self.verdict == "another reading":
            best = max(self.others, key=lambda other: other.tokens_per_step if other.better else 0)
            then = f"with {self.setting}, {best.by_place[0]:.0%} and {best.tokens_per_step:.2f}"
            return f"another reading of the draft's file is better: {now}; {then}"
        if self.verdict == "chance" and self.chance > ALIKE:
            return f"the target's answers are nearly one token, which any draft finds: {now}, and this says nothing"
        if self.verdict == "chance":
            return f"the draft agrees with this target by chance: {now}; drawn apart, {self.chance:.0%} would be right"
        if self.verdict == "below the stated rates":
            rates = ", ".join(f"{rate:.2f}" for rate in self.stated)
            return f"the draft agrees less than half as often as the recipe states ({rates}): {now}"
        return f"the draft agrees with this target: {now}, an upper limit of what a step emits"

    @property
    def fix(self) -> str:
        """What to do about the verdict."""
        return {
            "agrees": "",
            "another reading": f"write in the recipe: draft: {{{self.setting}}}",
            "chance": "look at the target's answers with `tandem run`; random weights give such ones"
            if self.chance > ALIKE
            else "use a draft that was trained for this target, or train one: tandem distill RECIPE",
            "below the stated rates": "correct validate.gates.acceptance, or use the draft that its card describes",
        }[self.verdict]
