"""Gate 2, greedy: compare speculation with plain decode, on every shipped graph.

Over prompts, through the engine: speculation against plain decode. Then at the end of every KV bucket, graph by graph:
each (batch, K, bucket) is driven from the same caches as plain decode until no position is left, so the last K
positions, where a step has less room than K, are visited by every graph. Stochastic graphs run there at temperature 0,
which must be greedy too. In low precision a difference is allowed at a near-tie only, and is counted.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.answers import Answers
from pipeline.validate.gates.driving import Row, drive
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.scoring import score
from pipeline.validate.report.schema import Difference, Edge, Losslessness


@dataclass(frozen=True)
class Rivals:
    """Tokens of two runs after the same prefix, which should be equal: of plain decode, and of another graph."""

    graph: str
    prompt: str
    prefix: list[int]
    plain: list[int]
    other: list[int]


@dataclass(frozen=True)
class Comparison:
    """Tokens compared, where they differ, and how many were compared by graph at the ends of buckets."""

    tokens: int = 0
    differences: tuple[Difference, ...] = ()
    edges: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Comparison) -> Comparison:
        edges = {graph: self.edges.get(graph, 0) + other.edges.get(graph, 0) for graph in self.edges | other.edges}
        return Comparison(self.tokens + other.tokens, self.differences + other.differences, edges)


def losslessness(compared: Comparison, tie: float, near_tie_rate: float) -> GateOutcome[Losslessness]:
    """Return the outcome: no difference except near-ties, and few of these."""
    faults = [
        f"{d.graph}: {d.prompt} differs from plain decode at position {d.position}, "
        f"gap {math.inf if d.gap is None else d.gap:.1e}"
        for d in compared.differences
        if not d.near_tie
    ]
    ties = len(compared.differences) - len(faults)
    findings = list(faults)
    if ties > near_tie_rate * compared.tokens:
        findings.append(f"{ties} near-tie differences in {compared.tokens} tokens exceed the rate {near_tie_rate}")
    section = Losslessness(
        tokens=compared.tokens,
        near_ties=ties,
        tie_tolerance=tie,
        differences=compared.differences,
        edges=tuple(Edge(graph=graph, tokens=tokens) for graph, tokens in compared.edges.items()),
    )
    return GateOutcome("losslessness", section, tuple(findings))


def compare_answers(inputs: GateInputs, answers: Answers, tie: float) -> Comparison:
    """Compare the first K with plain decode, where that ran, and every other K with the first, on all prompts."""
    names = [prompt.id for prompt in inputs.prompts]
    (first, first_answers), *others = answers.speculative.items()
    rivals = [
        Rivals(f"K={first}", names[i], answers.encoded[i], plain.tokens, first_answers[i].tokens)
        for i, plain in zip(answers.plain_indices, answers.plain, strict=True)
    ]
    rivals += [
        Rivals(f"K={steps}", name, prompt, expected.tokens, answer.tokens)
        for steps, of in others
        for name, prompt, expected, answer in zip(names, answers.encoded, first_answers, of, strict=True)
    ]
    return compare(inputs.engine, rivals, tie)


def compare_edges(engine: Engine, rivals: Sequence[Rivals], tie: float) -> Comparison:
    """Compare what `edge_rivals` drove, with the number of tokens of each graph."""
    edges: dict[str, int] = {}
    for rival in rivals:
        edges[rival.graph] = edges.get(rival.graph, 0) + len(rival.plain)
    return compare(engine, rivals, tie) + Comparison(edges=edges)


def edge_rivals(engine: Engine, kv: int, probes: Sequence[list[int]]) -> Iterator[Rivals]:
    """Run every graph of one KV bucket, whose caches hold the probes, over its last positions.

    Consecutive runs start from different tokens: the cache contents of one run are wrong for the
    next, so a graph that failed to write its own keys and values would be seen.
    """
    usable = min(kv, engine.length)
    span = min(2 * (max(g.draft_tokens for g in engine.graphs) + 1) + 2, usable - 2)
    if span < 1:
        return
    for batch in sorted({g.batch for g in engine.graphs if g.phase == "decode"}):
        graphs = [g for g in engine.graphs if g.kv == kv and g.batch == batch and g.phase in ("decode", "speculate")]
        plain = next(g for g in graphs if g.phase == "decode")
        others = [g for g in graphs if g is not plain]
        starts = [_starts(probes, batch, usable - span, variant) for variant in range(len(others) + 1)]
        expected = [drive(engine, plain, plain, rows) for rows in starts]
        for variant, spec in enumerate(others):
            driven = drive(engine, spec, plain, starts[variant], expected[variant])
            yield from _row_rivals(spec, f"start {variant}", expected[variant], driven)


def _row_rivals(spec: GraphSpec, start: str, expected: Sequence[Row], driven: Sequence[Row]) -> Iterator[Rivals]:
    for index, (plain, other) in enumerate(zip(expected, driven, strict=True)):
        where = f"end of bucket {spec.kv}, row {index}, {start}"
        yield Rivals(spec.name, where, plain.tokens[: plain.start], plain.new, other.new)


def _starts(probes: Sequence[list[int]], batch: int, position: int, variant: int) -> list[Row]:
    """Return ragged rows at and just before a position; their last token is from elsewhere in the probe."""
    rows = []
    for index, probe in enumerate(probes[:batch]):
        at = max(position - index, 1)
        rows.append(Row([*probe[:at], probe[(7 * at + 13 * variant + index) % len(probe)]]))
    return rows


def compare(engine: Engine, rivals: Sequence[Rivals], tie: float) -> Comparison:
    """Compare runs, which overwrites caches if they differ; two logits within the relative gap `tie` are a near-tie."""
    differences = (difference for rival in rivals for difference in _differences(engine, rival, tie))
    return Comparison(sum(len(rival.plain) for rival in rivals), tuple(differences))


def _differences(engine: Engine, rivals: Rivals, tie: float) -> Iterator[Difference]:
    """Yield the first difference, and each later token of the other run that differs from the target's choice."""
    plain, other = rivals.plain, rivals.other
    shorter = min(len(plain), len(other))
    first = next((i for i in range(shorter) if plain[i] != other[i]), shorter)
    if first < shorter:
        yield from _judged(engine, rivals, first, tie)
    elif len(plain) != len(other):
        yield Difference(
            graph=rivals.graph,
            prompt=rivals.prompt,
            position=len(rivals.prefix) + first,
            plain=plain[first] if first < len(plain) else -1,
            speculative=other[first] if first < len(other) else -1,
            gap=math.inf,
            near_tie=False,
        )


def _judged(engine: Engine, rivals: Rivals, first: int, tie: float) -> Iterator[Difference]:
    """Teacher-force the other run; yield the positions where it differs from the target's choice, and the gaps."""
    prefix, plain, other = rivals.prefix, rivals.plain, rivals.other
    sequence = [*prefix, *other]
    specs = [g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv >= len(sequence) - 1]
    logits_TV = score(engine, min(specs, key=lambda g: g.kv), [sequence[:-1]])[0][len(prefix) - 1 :]
    for at in range(first, len(other)):
        tokens = (plain[at], other[at]) if at == first else (other[at],)
        best, scale = float(logits_TV[at].max()), float(logits_TV[at].abs().max())
        gap = max(best - float(logits_TV[at, token]) for token in tokens) / scale
        if at == first or gap > 0:
            yield Difference(
                graph=rivals.graph,
                prompt=rivals.prompt,
                position=len(prefix) + at,
                plain=plain[at] if at == first else int(logits_TV[at].argmax()),
                speculative=other[at],
                gap=gap,
                near_tie=gap <= tie,
            )
