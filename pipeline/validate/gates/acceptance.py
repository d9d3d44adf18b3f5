"""Gate 3: acceptance of draft tokens by position, class and prompt, with the recipe's floor of tokens per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import no_string
from pipeline.runtime.engine import Generation
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.prompts import Prompt
from pipeline.validate.report.schema import Acceptance, OfClass, Speed


@dataclass(frozen=True)
class AcceptanceSection:
    """Acceptance with each K, and speed, which has no limit."""

    acceptance: tuple[Acceptance, ...]
    speed: Speed


def acceptance(measured: Sequence[Acceptance], speed: Speed, floor: float) -> GateOutcome[AcceptanceSection]:
    """Return the outcome: every K reaches the floor of tokens per step."""
    findings = tuple(
        f"K={of.draft_tokens}: {of.tokens_per_step:.2f} tokens per step is below the floor {floor}"
        for of in measured
        if of.tokens_per_step < floor
    )
    return GateOutcome("acceptance", AcceptanceSection(tuple(measured), speed), findings)


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
