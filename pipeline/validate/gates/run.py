"""All gates in one pass over an artifact: what runs, in which order, on which graphs.

The order saves work: the probes that parity scores leave the caches full to the end of a bucket, which is where
losslessness and the distribution are then tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.recipe.step_costs import least
from pipeline.sources.values import draft_token_ids
from pipeline.validate.draft.short import is_refused
from pipeline.validate.gates.acceptance import AcceptanceSection, Expected, acceptance, acceptance_of
from pipeline.validate.gates.answers import Answers, Sequences, answer_prompts, sequences_of
from pipeline.validate.gates.choices import CheckedChoices, answer_choices, check_choices, long_choices, prefill_choices
from pipeline.validate.gates.distribution import distribution, draw_bucket, draw_prefill
from pipeline.validate.gates.exact_tests import Drawn
from pipeline.validate.gates.inputs import MODELS, GateInputs, StageClock
from pipeline.validate.gates.losslessness import (
    Comparison,
    Rivals,
    compare_answers,
    compare_edges,
    edge_rivals,
    losslessness,
)
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.parity import ParitySection, parity
from pipeline.validate.gates.parts import Elsewhere, answer_elsewhere, measure_elsewhere, references_elsewhere
from pipeline.validate.gates.places import lookup_alone, places_of
from pipeline.validate.gates.references import ModelReference, compute_references
from pipeline.validate.gates.rules import draw_by_rules, ruled_graphs
from pipeline.validate.gates.scores import ModelScores, ScoreJob, along_scores, score_bucket
from pipeline.validate.gates.speed import measure_speed
from pipeline.validate.limits import TIE
from pipeline.validate.reference.golden import Golden
from pipeline.validate.report.schema import Distribution, Losslessness


@dataclass(frozen=True)
class Measurements:
    """What ran in the KV buckets: scores by model, comparisons, and what stochastic graphs drew.

    `tie` is the relative gap within which two logits are a near-tie: the first bucket's noise decides it.
    """

    scores: dict[str, ModelScores]
    compared: Comparison
    tie: float
    drawn: tuple[Drawn, ...]


@dataclass(frozen=True)
class GateRun:
    """Outcomes of all gates, and their inputs."""

    inputs: GateInputs
    answers: Answers
    sequences: Sequences
    references: dict[str, ModelReference]
    parity: GateOutcome[ParitySection]
    losslessness: GateOutcome[Losslessness]
    distribution: GateOutcome[Distribution] | None
    acceptance: GateOutcome[AcceptanceSection]
    seconds: dict[str, float]

    @property
    def outcomes(self) -> tuple[GateOutcome[object], ...]:
        """Every gate that ran, in the report's order."""
        sampled = () if self.distribution is None else (self.distribution,)
        return (self.parity, self.losslessness, *sampled, self.acceptance)

    @property
    def passed(self) -> bool:
        """True when no gate has a finding."""
        return all(outcome.passed for outcome in self.outcomes)

    @property
    def findings(self) -> dict[str, tuple[str, ...]]:
        """Findings by gate."""
        return {outcome.name: outcome.findings for outcome in self.outcomes}


def run_gates(inputs: GateInputs, elsewhere: Elsewhere | None = None) -> GateRun:
    """Run every gate, in parts on other machines if there are any; failures are findings, not errors."""
    clock = StageClock(inputs.log, inputs.progress)
    answers = answer_elsewhere(inputs, clock, elsewhere) if elsewhere else answer_prompts(inputs, clock)
    sequences = sequences_of(inputs, answers)
    with clock.stage("reference"):
        references = (
            references_elsewhere(inputs, sequences, elsewhere) if elsewhere else compute_references(inputs, sequences)
        )
    if elsewhere:
        measured = Measurements(*measure_elsewhere(inputs, answers, sequences, clock, elsewhere))
    else:
        measured = measure_buckets(inputs, answers, sequences, references, clock)
    followed = {model: along_scores(inputs, measured.scores[model], of.goldens) for model, of in references.items()}
    choices = _choices(inputs, sequences, (references["target"].goldens, followed["target"]), measured, clock)
    drawn = measured.drawn
    if inputs.is_sampled:
        with clock.stage("distribution", ", prefill graphs"):
            drawn += tuple(draw_prefill(inputs, sequences.probe_tokens, measured.tie))
    by_k = [acceptance_of(inputs.prompts, of, steps) for steps, of in answers.speculative.items()]
    with clock.stage("speed"):
        speed = measure_speed(inputs, answers, by_k[0])
    limits = inputs.recipe.validate_.gates
    expected = expected_acceptance(inputs, answers, sequences, references["draft"].goldens | followed["draft"])
    roundings = {model: of.rounding for model, of in references.items()}
    numbers = {sequence.name: number for number, sequence in enumerate(sequences.all)}
    return GateRun(
        inputs,
        answers,
        sequences,
        references,
        parity=parity(measured.scores, roundings, choices, numbers, limits.near_tie_rate),
        losslessness=losslessness(measured.compared, measured.tie, limits.near_tie_rate),
        distribution=distribution(drawn, inputs.engine.manifest.pair.candidates) if inputs.is_sampled else None,
        acceptance=acceptance(by_k, speed, limits, expected),
        seconds=clock.seconds,
    )


def expected_acceptance(
    inputs: GateInputs, answers: Answers, sequences: Sequences, goldens: Mapping[str, Golden]
) -> Expected:
    """Return what the acceptance of the answers is compared with; `goldens` are those of the draft."""
    steps, of_first = next(iter(answers.speculative.items()))
    draft_ids, manifest = draft_token_ids(inputs.checkpoints[1]), inputs.engine.manifest
    costs, report, floor = manifest.step_costs, inputs.draft_report, inputs.recipe.floor
    misread = f"{report.line}; {report.fix}" if report and is_refused(report, needs_acceptance=floor > 1) else None
    alone = least(costs) if costs else None
    return Expected(
        places_of(sequences.prompts, of_first, goldens, draft_ids, steps, inputs.engine.length),
        lookup_alone(sequences.prompts, manifest.lookup, steps),
        manifest.draft_kind.reads_target_states,
        alone[0] if alone else None,
        floor,
        misread,
    )


def measure_buckets(
    inputs: GateInputs,
    answers: Answers,
    sequences: Sequences,
    references: Mapping[str, ModelReference],
    clock: StageClock,
) -> Measurements:
    """Score, drive and draw, bucket by bucket, then compare what was driven, which overwrites caches.

    Scoring comes first: its probes fill the caches for the others, which begin near their ends. What these overwrite
    there does not matter to the next, whose tokens are judged over the same caches.
    """
    scores = {model: ModelScores(model, inputs.dtype_of(model)) for model in MODELS}
    drawn: list[Drawn] = []
    rivals: list[Rivals] = []
    tie, shorter = 0.0, 0
    for kv in inputs.engine.manifest.shapes.kv:
        with clock.stage("parity", f", cache bucket {kv}"):
            for model, reference in references.items():
                runs = score_bucket(inputs, ScoreJob(model, kv, shorter), sequences, reference.goldens)
                scores[model] = scores[model].plus(runs)
        if not shorter:  # the first bucket
            tie = TIE * scores["target"].floor
        shorter = kv
        with clock.stage("losslessness at bucket edges", f", cache bucket {kv}"):
            rivals += edge_rivals(inputs.engine, kv, sequences.probe_tokens)
        if inputs.is_sampled:
            with clock.stage("distribution", f", cache bucket {kv}"):
                drawn += draw_bucket(inputs, kv, sequences.probe_tokens, tie)
    if ruled_graphs(inputs.engine):
        with clock.stage("distribution", ", graphs of rules"):
            drawn += draw_by_rules(inputs, sequences.probe_tokens, tie)
    with clock.stage("losslessness", ", tokens that differ"):
        compared = compare_answers(inputs, answers, tie) + compare_edges(inputs.engine, rivals, tie)
    return Measurements(scores, compared, tie, tuple(drawn))


def _choices(
    inputs: GateInputs,
    sequences: Sequences,
    goldens: tuple[Mapping[str, Golden], ...],
    measured: Measurements,
    clock: StageClock,
) -> CheckedChoices:
    choices = list(answer_choices(sequences.prompts))
    with clock.stage("prefill graphs"):
        choices += [*prefill_choices(inputs.engine, sequences.probes), *long_choices(inputs.engine, sequences.probes)]
    floor, rate = measured.scores["target"].floor, inputs.recipe.validate_.gates.near_tie_rate
    by_name = {name: [of[name] for of in goldens if name in of] for name in goldens[0]}
    return check_choices(choices, by_name, floor, rate)
