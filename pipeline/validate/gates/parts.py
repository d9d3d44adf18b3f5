"""The gates in parts that run apart, each on an artifact that it opens: on nodes of a cluster, several at a time.

    answers of each K, and of plain decode -> goldens of groups of sequences -> scores of each model and bucket
    -> comparisons at the end of each bucket, and tokens drawn by each stochastic graph

A part is plain data and computes what the same step computes in one pass (`run.py`), token by token. The rest needs
what all parts gave, or a machine without other work: the verdicts, the prefill graphs, and the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from pipeline.runtime.calls import Generation
from pipeline.validate.gates.answers import Answers, ScoredSequence, Sequences, encode, generate, plain_indices
from pipeline.validate.gates.distribution import draw_bucket, drawing
from pipeline.validate.gates.driving import fill
from pipeline.validate.gates.exact_tests import Drawn
from pipeline.validate.gates.inputs import MODELS, GateInputs, StageClock
from pipeline.validate.gates.losslessness import Comparison, compare_answers, compare_edges, edge_rivals
from pipeline.validate.gates.references import (
    ModelReference,
    ReferenceInputs,
    compute_goldens,
    compute_references,
    goldens_of,
)
from pipeline.validate.gates.rules import draw_by_rules, ruled_graphs
from pipeline.validate.gates.scores import ModelScores, ScoredRun, ScoreJob, score_bucket
from pipeline.validate.limits import TIE
from pipeline.validate.report.schema import Cached

CHUNK_TOKENS = 256
"""Least tokens of a group: each group reads all weights, which takes as long as computing some tens of tokens."""


class Part(Protocol):
    """One part. `share`: its work beside that of the other parts of its kind."""

    @property
    def name(self) -> str:
        """Name of its log."""
        ...

    @property
    def share(self) -> float:
        """Its work, in any unit."""
        ...

    def run(self, inputs: GateInputs) -> Any:
        """Return what it measures on an open artifact."""
        ...


@dataclass(frozen=True)
class GoldensPart:
    """The goldens of a group of sequences, of both models: the only part that needs no artifact."""

    sequences: Sequences
    number: int

    @property
    def name(self) -> str:
        """Name of its log."""
        return f"reference-{self.number}"

    @property
    def share(self) -> float:
        """Its tokens."""
        return sum(len(sequence.reference) for sequence in self.sequences.all)

    def run(self, inputs: ReferenceInputs) -> dict[str, Cached]:
        """Fill the shared cache; return how many goldens were computed."""
        return compute_goldens(inputs, self.sequences)


@dataclass(frozen=True)
class AnswersPart:
    """Answers to prompts with K = `steps`, or by plain decode."""

    steps: int | None
    encoded: list[list[int]]

    @property
    def name(self) -> str:
        """Name of its log."""
        return "answers-plain" if self.steps is None else f"answers-k{self.steps}"

    @property
    def share(self) -> float:
        """Its prompts."""
        return float(len(self.encoded))

    def run(self, inputs: GateInputs) -> list[Generation]:
        """Return the answers."""
        return generate(inputs, self.encoded, self.steps)


@dataclass(frozen=True)
class ScoresPart:
    """One model's scores in one bucket."""

    job: ScoreJob
    sequences: Sequences
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of its log."""
        return f"scores-{self.job.model}-s{self.job.kv}"

    def run(self, inputs: GateInputs) -> list[ScoredRun]:
        """Return the runs, which are compared with goldens of the shared cache."""
        return score_bucket(inputs, self.job, self.sequences, goldens_of(inputs, self.job.model, self.sequences))


@dataclass(frozen=True)
class EdgesPart:
    """The comparisons at the end of a bucket."""

    kv: int
    probes: list[list[int]]
    tie: float
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of its log."""
        return f"edges-s{self.kv}"

    def run(self, inputs: GateInputs) -> Comparison:
        """Return the comparison."""
        _fill(inputs, self.kv, self.probes)
        rivals = list(edge_rivals(inputs.engine, self.kv, self.probes))
        return compare_edges(inputs.engine, rivals, self.tie)


@dataclass(frozen=True)
class DrawsPart:
    """What one stochastic graph draws."""

    graph: str
    kv: int
    probes: list[list[int]]
    tie: float
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of its log."""
        return f"draws-{self.graph}"

    def run(self, inputs: GateInputs) -> list[Drawn]:
        """Return the tokens, judged."""
        _fill(inputs, self.kv, self.probes)
        draw = draw_by_rules if self.graph.startswith(("verify", "propose")) else partial(draw_bucket, kv=self.kv)
        return list(draw(inputs, probes=self.probes, tie=self.tie, only=self.graph))


def _fill(inputs: GateInputs, kv: int, probes: Items[list[int]]) -> None:
    usable = min(kv, inputs.engine.length)
    fill(inputs.engine, kv, [tokens[:usable] for tokens in probes])


RunParts = Callable[[Items[Part]], list[Any]]
"""Runs parts elsewhere; returns their results in order."""


@dataclass(frozen=True)
class Elsewhere:
    """Runs parts on other machines, which have the goldens' shared cache; `places` returns how many run at a time."""

    run: RunParts
    places: Callable[[], int]


def answer_elsewhere(inputs: GateInputs, clock: StageClock, elsewhere: Elsewhere) -> Answers:
    """Answer all prompts with each K, and some of them by plain decode, as `answer_prompts`."""
    encoded, cut = encode(inputs)
    indices, ks = plain_indices(encoded), inputs.recipe.speculation.draft_tokens
    parts = [*(AnswersPart(steps, encoded) for steps in ks), AnswersPart(None, [encoded[i] for i in indices])]
    with clock.stage("answers"):
        *speculative, plain = elsewhere.run(parts)
    return Answers(encoded, cut, dict(zip(ks, speculative, strict=True)), plain, indices)


def references_elsewhere(inputs: GateInputs, sequences: Sequences, elsewhere: Elsewhere) -> dict[str, ModelReference]:
    """Return the reference of target and draft, as `compute_references`, from goldens that the parts computed."""
    parts = [GoldensPart(group, number) for number, group in enumerate(groups(sequences, elsewhere.places()))]
    found: list[dict[str, Cached]] = elsewhere.run(parts)
    computed = {model: sum(counts[model].computed for counts in found) for model in MODELS}
    references = compute_references(inputs, sequences)
    return {model: replace(of, counts=_counts(of.counts, computed[model])) for model, of in references.items()}


def _counts(here: Cached, elsewhere: int) -> Cached:
    return Cached(computed=here.computed + elsewhere, cached=here.cached - elsewhere)


def groups(sequences: Sequences, most: int) -> Iterator[Sequences]:
    """Yield at most `most` groups of sequences of about as many tokens each."""
    tokens = sum(len(sequence.reference) for sequence in sequences.all)
    sizes = [0] * max(1, min(most, tokens // CHUNK_TOKENS, len(sequences.all)))
    place: dict[str, int] = {}
    for sequence in sorted(sequences.all, key=lambda one: -len(one.reference)):
        place[sequence.name] = sizes.index(min(sizes))
        sizes[place[sequence.name]] += len(sequence.reference)
    for group in range(len(sizes)):

        def chosen(of: Items[ScoredSequence], group: int = group) -> tuple[ScoredSequence, ...]:
            return tuple(sequence for sequence in of if place[sequence.name] == group)

        yield Sequences(chosen(sequences.prompts), chosen(sequences.probes))


def measure_elsewhere(
    inputs: GateInputs, answers: Answers, sequences: Sequences, clock: StageClock, elsewhere: Elsewhere
) -> tuple[dict[str, ModelScores], Comparison, float, tuple[Drawn, ...]]:
    """Score all buckets, then compare their ends and draw: the first bucket's noise decides what a near-tie is.

    Returns the values of `run.Measurements`.
    """
    kvs = inputs.engine.manifest.shapes.kv
    jobs = [ScoreJob(model, kv, shorter) for shorter, kv in zip((0, *kvs), kvs, strict=False) for model in MODELS]
    with clock.stage("parity"):
        runs = elsewhere.run([ScoresPart(job, sequences) for job in jobs])
    of_jobs = list(zip(jobs, runs, strict=True))
    first = [runs for job, runs in of_jobs if (job.model, job.kv) == ("target", kvs[0])]
    tie = TIE * ModelScores("target", inputs.dtype_of("target"), tuple(first[0])).floor
    with clock.stage("losslessness at bucket edges, distribution"):
        compared, drawn = _at_ends(inputs, sequences.probe_tokens, tie, elsewhere)
    scores = {model: _scores(inputs, model, of_jobs) for model in MODELS}
    return scores, compare_answers(inputs, answers, tie) + compared, tie, drawn


def _scores(inputs: GateInputs, model: str, of_jobs: Items[tuple[ScoreJob, list[ScoredRun]]]) -> ModelScores:
    runs = tuple(run for job, runs in of_jobs for run in runs if job.model == model)
    return ModelScores(model, inputs.dtype_of(model), runs)


def _at_ends(
    inputs: GateInputs, probes: list[list[int]], tie: float, elsewhere: Elsewhere
) -> tuple[Comparison, tuple[Drawn, ...]]:
    kvs, engine = inputs.engine.manifest.shapes.kv, inputs.engine
    edges = [EdgesPart(kv, probes, tie) for kv in kvs]
    draws = [DrawsPart(graph, kv, probes, tie) for kv in kvs for graph in drawing(engine, kv)]
    draws += [DrawsPart(graph.name, graph.kv, probes, tie) for graph in ruled_graphs(engine)]
    results = elsewhere.run([*edges, *draws])
    compared, drawn = results[: len(edges)], results[len(edges) :]
    return sum(compared, Comparison()), tuple(one for of in drawn for one in of)
