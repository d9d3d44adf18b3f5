"""Gate 1: numerical parity of the compiled models. Teacher-forced logits of the shipped `score` graphs.

Three-way (see `reference/layers.py`): the baseline is transformers one precision up, noise is transformers in the
recipe's dtype, the artifact is judged. Two kinds of bound must both hold. The *map* bounds the largest error of the
top k logits, relative to the largest logit, whatever the dtype (the tolerances of the Neuron plugin's logit
validation). *Noise* bounds the error against what the dtype itself does to the same tokens: over all of them, over
every slice (a prompt, a stretch of positions, a graph), on each token, and in every layer's keys and values. Nothing
that passes one rescues what fails another. The tokens of all answers and of the prefill graphs are judged, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.validate.gates.choices import CheckedChoices
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.router_ties import router_findings
from pipeline.validate.gates.scores import ModelScores
from pipeline.validate.limits import MAP, MAP_ALL, SLICE_TOKENS, limits, most_near_ties
from pipeline.validate.report.schema import Choices, Divergence, ModelParity, Points, Rounding, Slice


@dataclass(frozen=True)
class ParitySection:
    """Parity of each model, and choices of the target."""

    models: dict[str, ModelParity]
    choices: Choices


def parity(
    scores: Mapping[str, ModelScores],
    roundings: Mapping[str, Rounding | None],
    choices: CheckedChoices,
    sequence_numbers: Mapping[str, int],
    near_tie_rate: float,
) -> GateOutcome[ParitySection]:
    """Return the outcome for scores of both models and choices of the target; `sequence_numbers` as in the report."""
    findings = [finding for of in scores.values() for finding in parity_findings(of, near_tie_rate)]
    models = {model: model_parity(of, roundings[model], sequence_numbers) for model, of in scores.items()}
    return GateOutcome("parity", ParitySection(models, choices.counts), (*findings, *choices.findings))


def error_over_noise(table: dict[str, Tensor], rows: Tensor | None = None) -> float:
    """Return RMS error over RMS noise: the larger one of recorded logits and of the whole vocabulary."""
    chosen = slice(None) if rows is None else rows
    ratios = [
        table[f"square_error_{part}"][chosen].sum() / table[f"square_noise_{part}"][chosen].sum().clamp(min=1e-300)
        for part in ("top", "all")
    ]
    return float(torch.stack(ratios).amax().sqrt())


def parity_findings(scores: ModelScores, near_tie_rate: float) -> list[str]:
    """Return the findings on a model, each with its location; empty if it passes."""
    table = scores.table
    if not bool(table["finite"].all()):
        row = int((table["finite"] == 0).nonzero()[0])
        return [f"{scores.model}: logits are not finite, first at {scores.place(row)}"]
    findings = (
        *_experts(scores, near_tie_rate),
        *_over_map(scores),
        *_layers(scores),
        *_over_noise(scores),
        *_flips(scores, near_tie_rate),
    )
    return [f"{scores.model}: {finding}" for finding in findings]


def _experts(scores: ModelScores, near_tie_rate: float) -> Iterator[str]:
    routed = [run.experts for run in scores.runs]
    yield from router_findings(routed, scores.router, near_tie_rate, scores.place)
    limit, worst = limits(scores.dtype).expert, scores.compared_experts.worst
    if worst is not None and (worst.error_over_noise is None or worst.error_over_noise > limit):
        ratio = f"{worst.error_over_noise or math.inf:.2f} times the noise of {scores.dtype}"
        where = f"over the {worst.tokens} tokens that used it"
        yield f"error of expert {worst.expert} of layer {worst.layer} is {ratio} {where}; the limit is {limit}"


def _over_map(scores: ModelScores) -> Iterator[str]:
    """Return errors over the map's limits.

    Where transformers in this dtype exceeds a limit, its largest error decides: that of a single token, as of a slice.
    """
    table = scores.table
    for name, bound in (*((str(k), bound) for k, bound in MAP.items()), ("all", MAP_ALL)):
        column = table[f"error_{name}"] - table["allowed"]
        row = int(column.argmax())
        limit = max(bound, limits(scores.dtype).slice * float(table[f"noise_{name}"].max()))
        if not float(column[row]) <= limit:
            yield f"top-{name} error {float(column[row]):.2e} exceeds {limit:.2g} at {scores.place(row)}"


def _over_noise(scores: ModelScores) -> Iterator[str]:
    table, limit = scores.table, limits(scores.dtype)
    ratio = error_over_noise(table)
    if not ratio <= limit.all:
        yield f"error is {ratio:.2f} times the noise of {scores.dtype}, over all tokens; the limit is {limit.all}"
    slices = [(error_over_noise(table, m), kind, name) for kind, name, m in scores.groups() if m.sum() >= SLICE_TOKENS]
    worst, kind, name = max(slices, default=(0.0, "", ""))
    if not worst <= limit.slice:
        yield f"error is {worst:.2f} times the noise of {scores.dtype} in {kind} {name}; the limit is {limit.slice}"
    row = int(table["over_noise"].argmax())
    over = float(table["over_noise"][row])
    if not over <= limit.token:
        yield f"a token's error is {over:.1f} times its noise at {scores.place(row)}; the limit is {limit.token}"


def _layers(scores: ModelScores) -> Iterator[str]:
    """Return the first layer whose keys or values exceed the limit: the location of a fault, not its effects."""
    limit = limits(scores.dtype).layer
    for layer, ratios in enumerate(scores.layers_over_noise):
        for what, ratio in zip(("keys", "values"), ratios, strict=True):
            if not ratio <= limit:
                noise = f"{ratio:.2f} times the noise of {scores.dtype}"
                yield f"error of {what} of layer {layer} is {noise}; the limit is {limit}"
                return


def _flips(scores: ModelScores, near_tie_rate: float) -> Iterator[str]:
    table = scores.table
    flips, ties = int(table["flip"].sum()), int(table["near_tie"].sum())
    if flips > ties:
        row = int(((table["flip"] > 0) & (table["near_tie"] == 0)).nonzero()[0])
        gap = float(table["gap_chosen"][row])
        yield f"{flips - ties} tokens flip that are not near-ties, first at {scores.place(row)}, gap {gap:.2e}"
    usual = int(table["flip_noise"].sum())
    if ties > most_near_ties(len(table["flip"]), usual, near_tie_rate):
        yield f"{ties} near-tie flips in {len(table['flip'])} tokens; transformers in {scores.dtype} has {usual}"


def model_parity(scores: ModelScores, rounding: Rounding | None, sequence_numbers: Mapping[str, int]) -> ModelParity:
    """Return one model's section of the report."""
    table = scores.table
    worst = {name: float(table[f"error_{name}"].max()) for name in (*map(str, MAP), "all")}
    return ModelParity(
        dtype=scores.dtype,
        tokens=len(table["flip"]),
        worst_relative_error=dict(worst),
        error_over_noise=error_over_noise(table),
        largest_token_over_noise=float(table["over_noise"].max()),
        sigma_ratio=float(table["sigma_ratio"].median()),
        kl_mean=float(table["kl"].mean()),
        kl_largest=float(table["kl"].max()),
        kl_noise_mean=float(table["kl_noise"].mean()),
        bhattacharyya_smallest=float(table["bhattacharyya"].min()),
        flips=int(table["flip"].sum()),
        near_ties=int(table["near_tie"].sum()),
        flips_of_noise=int(table["flip_noise"].sum()),
        first_divergence=_first_divergence(scores),
        layers=scores.layers_over_noise,
        experts=None if scores.router is None else scores.router.section(scores.compared_experts),
        rounding=rounding,
        slices=tuple(_slices(scores)),
        points=_points(scores, sequence_numbers),
    )


def _slices(scores: ModelScores) -> Iterator[Slice]:
    table = scores.table
    for kind, name, rows in scores.groups():
        yield Slice(
            kind=kind,
            name=name,
            tokens=int(rows.sum()),
            error_over_noise=error_over_noise(table, rows),
            flips=int(table["flip"][rows].sum()),
            largest_error=float(table["error_1000"][rows].max()),
        )


def _points(scores: ModelScores, sequence_numbers: Mapping[str, int]) -> Points:
    """Return the numbers of every token, in columns."""
    table = scores.table
    graphs = tuple(dict.fromkeys(run.graph for run in scores.runs))
    runs = [scores.runs[number] for number in table["run"].tolist()]
    return Points(
        graphs=graphs,
        sequence=tuple(sequence_numbers[run.sequence.name] for run in runs),
        graph=tuple(graphs.index(run.graph) for run in runs),
        position=tuple(map(int, table["position"])),
        flip=tuple(int(flip + tie) for flip, tie in zip(table["flip"], table["near_tie"], strict=True)),
        error=_short(table["error_50"]),
        noise=_short(table["noise_50"]),
        sigma_ratio=_short(table["sigma_ratio"]),
        kl=_short(table["kl"]),
        bhattacharyya=_short(table["bhattacharyya"]),
        gap=_short(table["gap"]),
        gap_ulp=_short(table["gap_ulp"]),
    )


def _short(column: Tensor) -> tuple[float, ...]:
    """Round to four significant digits: these columns are long."""
    return tuple(float(f"{value:.4g}") for value in column.tolist())


def _first_divergence(scores: ModelScores) -> Divergence | None:
    table = scores.table
    rows = table["flip"].nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    run = scores.run_at(row)
    return Divergence(
        prompt=run.sequence.name,
        graph=run.graph,
        position=int(table["position"][row]),
        expected=int(table["expected"][row]),
        chosen=int(table["chosen"][row]),
        gap=float(table["gap"][row]),
        gap_ulp=float(table["gap_ulp"][row]),
        near_tie=bool(table["near_tie"][row]),
    )
