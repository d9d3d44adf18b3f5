"""Tokens of the answers and of the prefill graphs against the baseline's own choice after the same tokens.

Part of gate 1: teacher forcing covers `score` graphs; this covers what decode, speculate and prefill graphs chose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.graphs.arguments import GREEDY, PromptRow, prefill_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.batch import Row as RequestRow
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.answers import ScoredSequence
from pipeline.validate.gates.driving import Row, step
from pipeline.validate.gates.router_ties import first_ties
from pipeline.validate.gates.token_columns import gap_of, noise_at
from pipeline.validate.limits import AFTER_ROUTER_TIES, TIE, most_near_ties
from pipeline.validate.reference.golden import Golden
from pipeline.validate.report.schema import Choices

SHOWN_FINDINGS = 5


@dataclass(frozen=True)
class Choice:
    """A token that was chosen after position `at` of a sequence, and the graph or answer that it is from."""

    chooser: str
    sequence: str
    at: int
    token: int


@dataclass(frozen=True)
class CheckedChoices:
    """Counts for the report, and findings."""

    counts: Choices
    findings: tuple[str, ...]


def check_choices(
    choices: Sequence[Choice], goldens: Mapping[str, Sequence[Golden]], floor: float, near_tie_rate: float
) -> CheckedChoices:
    """Compare choices with the baseline's own; `floor` is the median noise of the largest logits.

    A sequence has more than one golden where an artifact has other experts than the baseline at near-ties of a router:
    that which fits best counts. A graph can choose others than a `score` graph there, so a few tokens may fit none.
    """
    findings: list[str] = []
    near_ties = flips_of_noise = unexplained = 0
    ties = first_ties({name: of[-1] for name, of in goldens.items()})
    for choice in choices:
        at, token = choice.at, choice.token
        known = [golden for golden in goldens[choice.sequence] if at < len(golden.ids)]
        golden = min(known, key=lambda one: gap_of(one, at, token))
        gap = gap_of(golden, at, token)
        if gap > TIE * max(noise_at(golden, at), floor):
            if at >= ties.get(choice.sequence, at + 1):
                unexplained += 1
                continue
            findings.append(
                f"{choice.chooser}: token {token} at position {at + 1} is not the baseline's, gap {gap:.1e}"
            )
        near_ties += gap > 0
        flips_of_noise += int(golden.noise.best[at] != golden.baseline.best[at])
    if unexplained > (most := math.ceil(AFTER_ROUTER_TIES * len(choices))):
        findings.append(f"{unexplained} tokens after near-ties of a router are not the baseline's; the limit is {most}")
    # Whole tokens: of fewer than 1 / rate, a single near-tie is no evidence of more than the rate.
    allowed = math.ceil(most_near_ties(len(choices), flips_of_noise, near_tie_rate))
    if near_ties > allowed:
        findings.append(f"{near_ties} near-ties in {len(choices)} tokens exceed the limit {allowed}")
    counts = Choices(
        tokens=len(choices), near_ties=near_ties, flips_of_noise=flips_of_noise, after_router_ties=unexplained
    )
    return CheckedChoices(counts, tuple(findings[:SHOWN_FINDINGS]))


def answer_choices(sequences: Sequence[ScoredSequence]) -> Iterator[Choice]:
    """Yield the tokens of all answers."""
    for sequence in sequences:
        for at in range(sequence.prompt, len(sequence.tokens)):
            yield Choice(f"the answer to {sequence.name}", sequence.name, at - 1, sequence.tokens[at])


def prefill_choices(engine: Engine, probes: Sequence[ScoredSequence]) -> Iterator[Choice]:
    """Run every prefill graph on ragged probes, and decode one token after each; yield all these tokens."""
    for spec in engine.graphs:
        if spec.phase == "prefill":
            yield from _prefill(engine, spec, probes)


def long_choices(engine: Engine, probes: Sequence[ScoredSequence]) -> Iterator[Choice]:
    """Read prompts that are longer than every prefill bucket, in rows side by side; yield the token after each.

    One fills the caches, one has a token more than the bucket, so that nothing is left for a chunk.
    """
    longest = engine.manifest.shapes.prefill[-1]
    whole = [probe for probe in probes if len(probe.reference) == len(probe.tokens)]
    rows = {
        slot: RequestRow(probe.tokens[:length], length, 0, GREEDY)
        for slot, (probe, length) in enumerate(zip(whole, (engine.length - 1, longest + 1), strict=False))
        if longest < length < engine.length
    }
    for slot, token in (engine.batch.prefill(rows) if rows else {}).items():
        at = rows[slot].prompt - 1
        yield Choice(f"prompt of {at + 1} tokens, read in chunks", whole[slot].name, at, token)


def _prefill(engine: Engine, spec: GraphSpec, probes: Sequence[ScoredSequence]) -> Iterator[Choice]:
    """Prefill ragged probes, the full bucket and a single token among them, into slots in reverse order.

    A graph that continues prompts reads each probe in two chunks, of other lengths in each row.
    """
    rows = min(spec.batch, len(probes))
    longest = min(spec.tokens, engine.length - 1)
    starts = [probe.tokens[: max(longest - 3 * row, 1)] for row, probe in enumerate(probes[:rows])]
    if rows > 1:
        starts[-1] = probes[rows - 1].tokens[:1]
    prompts = [PromptRow(start, rows - 1 - row) for row, start in enumerate(starts)]
    if spec.continues:
        cuts = [max(len(start) * (row + 1) // (rows + 1), 1) for row, start in enumerate(starts)]
        pairs = list(zip(prompts, cuts, strict=True))
        begins = [PromptRow(one.tokens[:cut], one.slot) for one, cut in pairs]
        engine.ranks.run(spec, prefill_arguments(spec, begins, engine.rows))
        prompts = [PromptRow(one.tokens[cut - 1 :], one.slot, position=cut - 1) for one, cut in pairs]
    first = engine.ranks.run(spec, prefill_arguments(spec, prompts, engine.rows))["token"]
    decode = min(
        (g for g in engine.graphs if g.phase == "decode" and g.batch >= rows and g.kv > longest),
        key=lambda g: (g.batch, g.kv),
    )
    after = [Row(probe.tokens[: len(start) + 1]) for probe, start in zip(probes, starts, strict=False)]
    spare = [Row([0])] * (decode.batch - rows)
    active = [True] * rows + [False] * len(spare)
    second = step(engine, decode, [*reversed(after), *spare], active)
    for row, start in enumerate(starts):
        name = probes[row].name
        yield Choice(f"{spec.name}, row {row}", name, len(start) - 1, int(first[row]))
        (token,) = second[rows - 1 - row]
        yield Choice(f"{decode.name} after {spec.name}, row {row}", name, len(start), token)
