"""Gate 3: acceptance of draft tokens by place, class and prompt, against limits and the draft's choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import no_string
from pipeline.recipe.schema import Gates
from pipeline.runtime.calls import Generation
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.places import StepPlace, findings_of
from pipeline.validate.prompts import Prompt
from pipeline.validate.report.schema import Acceptance, OfClass, Speed

STATED_SHARE = 0.9
"""Least share of a stated acceptance rate that is measured: prompts differ."""


@dataclass(frozen=True)
class AcceptanceSection:
    """Acceptance with each K, and speed, which has no limit."""

    acceptance: tuple[Acceptance, ...]
    speed: Speed


@dataclass(frozen=True)
class Expected:
    """What the first K is compared with: its places, and the tokens per step of prompt lookup alone.

    `step_cost`: decode steps that a step with this K costs in the smallest batch, if the recipe states it. `floor`:
    least tokens per step of every K. `misread`: why the head's file is no use as it is read, which places cannot show:
    teacher forcing reads the same file.
    """

    places: Sequence[StepPlace]
    lookup_alone: float
    is_head: bool
    step_cost: float | None = None
    floor: float = 1.0
    misread: str | None = None


def acceptance(
    measured: Sequence[Acceptance], speed: Speed, limits: Gates, expected: Expected
) -> GateOutcome[AcceptanceSection]:
    """Return the outcome: every K reaches the floor, and each place accepts what the draft's own choices say."""
    first, floor = measured[0], expected.floor
    findings = [] if expected.misread is None else [expected.misread]
    findings += [
        f"K={of.draft_tokens}: {of.tokens_per_step:.2f} tokens per step is below the floor {floor}"
        for of in measured
        if of.tokens_per_step < floor
    ]
    findings += findings_of(expected.places, is_head=expected.is_head, near_tie_rate=limits.near_tie_rate)
    findings += [
        f"place {number} of a step: {rate:.2f} of the drafts accepted, the recipe states {stated}"
        for number, (rate, stated) in enumerate(zip(first.accepted_given_previous, limits.acceptance, strict=False), 1)
        if rate < STATED_SHARE * stated
    ]
    if expected.is_head and floor > 1 and first.tokens_per_step < expected.lookup_alone:
        alone = f"prompt lookup alone gives {expected.lookup_alone:.2f}"
        findings.append(f"K={first.draft_tokens}: {first.tokens_per_step:.2f} tokens per step; {alone}")
    if expected.step_cost is not None and first.tokens_per_step < expected.step_cost:
        cost = f"a step costs {expected.step_cost:.2f} decode steps"
        findings.append(f"K={first.draft_tokens}: {first.tokens_per_step:.2f} tokens per step; {cost}")
    forced = tuple(place.forced / max(place.tried, 1) for place in expected.places)
    first = first.model_copy(update={"teacher_forced": forced, "lookup_alone": expected.lookup_alone})
    return GateOutcome("acceptance", AcceptanceSection((first, *measured[1:]), speed), tuple(findings))


def acceptance_of(prompts: Sequence[Prompt], answers: Sequence[Generation], steps: int) -> Acceptance:
    """Return the acceptance of one K."""
    no_string(prompts, "prompts", "prompts")
    emitted = _emitted(answers)
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    return Acceptance(
        draft_tokens=steps,
        tokens_per_step=tokens_per_step(answers),
        accepted_by_position=_by_position(emitted, steps),
        accepted_given_previous=tuple(given_previous(emitted, steps)),
        lengths=tuple(Counter(emitted)[n] for n in range(1, steps + 2)),
        by_class={kind: _of_class(prompts, answers, kind, steps) for kind in kinds},
        by_prompt={p.id: tokens_per_step([a]) for p, a in zip(prompts, answers, strict=True) if a.steps},
    )


def given_previous(emitted: Sequence[int], steps: int) -> list[float]:
    """Return the acceptance rate at each of `steps` positions, given that all before were accepted."""
    reached = [sum(n > position + 1 for n in emitted) for position in range(steps)]
    tried = [len(emitted), *reached[:-1]]
    return [count / max(of, 1) for count, of in zip(reached, tried, strict=True)]


def tokens_per_step(answers: Sequence[Generation]) -> float:
    """Return the mean number of tokens that a speculative step emits."""
    return sum(_emitted(answers)) / max(sum(answer.steps for answer in answers), 1)


def _emitted(answers: Sequence[Generation]) -> list[int]:
    return [tokens for answer in answers for tokens in answer.emitted_per_step]


def _by_position(emitted: Sequence[int], steps: int) -> tuple[float, ...]:
    return tuple(sum(n > position + 1 for n in emitted) / max(len(emitted), 1) for position in range(steps))


def _of_class(prompts: Sequence[Prompt], answers: Sequence[Generation], kind: str, steps: int) -> OfClass:
    chosen = [answer for prompt, answer in zip(prompts, answers, strict=True) if prompt.kind == kind]
    return OfClass(tokens_per_step=tokens_per_step(chosen), accepted_by_position=_by_position(_emitted(chosen), steps))
