"""Measure what a pair's steps cost here and what they gain, and say which K and which buckets to build.

In every batch bucket plain decode and each K that was built take steps in turn, so costs are ratios of one run. A
step's cost is fitted as a straight line over K; its tokens follow from the acceptance rates (Leviathan et al. 2023).
Prompts and answers have lengths; the few buckets that pad them least follow from those (`buckets.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, no_string
from pipeline.files.atomic import atomic_file
from pipeline.graphs.arguments import Arguments, StepRow, step_arguments
from pipeline.measure.buckets import buckets_for, padded
from pipeline.progress import Log
from pipeline.recipe import load
from pipeline.recipe.edit import read_text

if TYPE_CHECKING:
    from pipeline.graphs.spec import GraphSpec
    from pipeline.runtime.engine import Engine
    from pipeline.validate.prompts import Prompt

LARGEST_K = 8
TURNS, STEPS = 5, 6
"""Turns of each K, and steps of a turn, by which a step is timed."""

MOST_PREFILL, MOST_KV = 3, 2
"""Buckets at most: each is a graph for every batch and phase."""

PENALTY = 0.02
"""A further K must gain more than this share on some class to be worth the time that its graphs take to compile."""


@dataclass(frozen=True)
class Tuning:
    """What was measured. `step_costs` by K built, in plain steps, in the smallest batch bucket, and `larger` in each of
    the others; `rates` of acceptance given those before.
    """

    step_costs: dict[int, float]
    rates: dict[str, list[float]]
    draft_tokens: list[int]
    expected: dict[str, dict[int, float]] = field(default_factory=dict)
    """Tokens per plain step's time, by prompt class (`all` first), of steps with a copy (`copies`, last), and K."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """`prefill` and `kv` buckets."""
    larger: dict[int, dict[int, float]] = field(default_factory=dict)
    smallest: int = 1
    padding: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tokens run over tokens there are, with the buckets of now and with those of `shapes`."""

    def cost(self, k: int) -> float:
        """Cost of any K in the smallest batch, on the line through plain decode and what was measured."""
        return _cost(self.step_costs, k)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        by_batch = {
            batch: [round(_cost(of, k), 3) for k in self.draft_tokens]
            for batch, of in ({self.smallest: self.step_costs} | self.larger).items()
        }
        costs: Any = by_batch if self.larger else by_batch[self.smallest]
        measured = {str(k): cost for k, cost in self.step_costs.items()}
        return {"draft_tokens": self.draft_tokens, "step_costs": costs, "measured_costs": measured,
                "accepted_given_previous": self.rates, "expected_speed": self.expected,
                "shapes": self.shapes, "padding": self.padding}  # fmt: skip


def tune(engine: Engine, prompts: Sequence[Prompt], prompts_per_class: int, tokens: int, log: Log) -> Tuning:
    """Measure a loaded artifact.

    Raises:
        InputError: no answer has a step.

    """
    from pipeline.validate.gates.acceptance import acceptance_of, given_previous

    no_string(prompts, "prompts", "prompts")
    chosen = _spread(prompts, prompts_per_class)
    built = list(engine.manifest.draft_tokens)
    smallest, *others = engine.manifest.shapes.batch
    costs = {batch: _costs(engine, batch, min(tokens, engine.length // 2)) for batch in (smallest, *others)}
    log(f"measured steps of {len(costs)} batch buckets")
    answers = []
    for number, prompt in enumerate(chosen):
        encoded = engine.text.chat(prompt.text) if engine.text.has_chat else engine.text.encode(prompt.text)
        answers += engine.generate([encoded], max_new_tokens=tokens, draft_tokens=built[-1])
        log(f"{number + 1} of {len(chosen)} prompts")
    if not any(answer.emitted_per_step for answer in answers):
        what = "every answer ended with its first token: there is no step to measure"
        raise InputError(what, where="tune", fix="use other prompts, or more --max-new-tokens")
    rates = {"all": list(acceptance_of(chosen, answers, built[-1]).accepted_given_previous)}
    for kind in dict.fromkeys(prompt.kind for prompt in chosen):
        of = [(p, a) for p, a in zip(chosen, answers, strict=True) if p.kind == kind]
        rates[kind] = list(acceptance_of([p for p, _ in of], [a for _, a in of], built[-1]).accepted_given_previous)
    steps = [step for answer in answers for step in zip(answer.emitted_per_step, answer.copied_per_step, strict=True)]
    if copied := [emitted for emitted, copies in steps if copies]:
        rates["copies"] = given_previous(copied, built[-1])
    found = choose(costs.pop(smallest), rates)
    return replace(found, smallest=smallest, larger=costs, **_shapes(engine, prompts, tokens))


def _costs(engine: Engine, batch: int, position: int) -> dict[int, float]:
    """Cost of a step with each K, in plain steps, when all rows of a batch bucket take part at a position."""
    how = engine.manifest.sampling[0]
    graphs = [
        g for g in engine.graphs
        if g.phase in ("decode", "speculate") and (g.batch, g.sampling) == (batch, how) and g.kv > position
    ]  # fmt: skip
    kv = min(g.kv for g in graphs)
    timed = [(g.draft_tokens, g, full_step(engine, g, position)) for g in graphs if g.kv == kv]
    took: dict[int, list[float]] = {steps: [] for steps, *_ in timed}
    for turn in range(TURNS + 1):
        for steps, graph, arguments in timed:
            for _ in range(STEPS):
                started = time.perf_counter()
                engine.ranks.run(graph, arguments)
                if turn:  # graphs are opened on first use
                    took[steps].append(time.perf_counter() - started)
    plain = median(took.pop(0))
    return {k: median(of) / plain for k, of in took.items()}


def full_step(engine: Engine, graph: GraphSpec, position: int) -> Arguments:
    """Arguments of a step of all rows of a graph, its caches filled up to a position."""
    row = StepRow(position % engine.manifest.vocab, position)
    return step_arguments(graph, dict.fromkeys(range(graph.batch), row))


def _shapes(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Buckets for all prompts with answers of up to so many tokens, and what they pad."""
    text, now = engine.text, engine.manifest.shapes
    lengths = [len(text.chat(p.text) if text.has_chat else text.encode(p.text)) for p in prompts]
    ends = [length + tokens for length in lengths]
    # On a CPU attention reads the keys that there are, whatever the bucket.
    reads_all = engine.manifest.requires.get("device") != "cpu"
    shapes = {
        "prefill": buckets_for(lengths, now.prefill[-1], MOST_PREFILL, 32),
        "kv": buckets_for(ends, now.kv[-1], MOST_KV, 128) if reads_all else [now.kv[-1]],
    }
    total = sum(min(length, now.prefill[-1]) for length in lengths)
    padding = {"prefill": (padded(lengths, now.prefill) / total, padded(lengths, shapes["prefill"]) / total)}
    if reads_all:
        padding["kv"] = tuple(padded(ends, of) / sum(ends) for of in (now.kv, shapes["kv"]))  # type: ignore[assignment]
    return {"shapes": shapes, "padding": padding}


def choose(costs: dict[int, float], rates: dict[str, list[float]]) -> Tuning:
    """Which K to build: the best over all prompts, and others that a class of prompts gains by."""
    found = Tuning(costs, rates, [])
    expected = {kind: {k: tokens_of(of, k) / found.cost(k) for k in range(LARGEST_K + 1)} for kind, of in rates.items()}
    wanted: list[int] = []
    for speeds in expected.values():
        best = max(range(1, LARGEST_K + 1), key=lambda k: speeds[k])
        known = max((speeds[k] for k in wanted), default=0.0)
        if not wanted or speeds[best] > max(known, 1.0) * (1 + PENALTY):
            wanted.append(best)
    return Tuning(costs, rates, sorted(wanted), expected)


def tokens_of(rates: Sequence[float], k: int) -> float:
    """Expected tokens of a step with K drafts; places beyond the last measured repeat its rate."""
    every = [*rates, *[rates[-1]] * k][:k]
    return 1 + sum(accumulate(every, mul))


def _cost(measured: dict[int, float], k: int) -> float:
    if k in measured:
        return measured[k]
    slope, base = _line(sorted(measured.items()))
    return 1.0 if k == 0 else base + slope * k


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Slope and base of a least-squares line; through plain decode's cost of 1 where there is one point."""
    if len(points) == 1:
        (k, cost), base = points[0], 1.0
        return (cost - base) / k, base
    xs, ys = [k for k, _ in points], [cost for _, cost in points]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x in xs)
    return slope, my - slope * mx


def _spread(prompts: Sequence[Prompt], each: int) -> list[Prompt]:
    """The first prompts of each class."""
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    return [prompt for kind in kinds for prompt in [p for p in prompts if p.kind == kind][:each]]


def curve(found: Tuning, name: str) -> str:
    """A page with the expected speed over K, one line a class."""
    from pipeline.validate.report.page import plot_page
    from pipeline.validate.report.plots import Axis, Plot

    top = max(max(speeds.values()) for speeds in found.expected.values())
    plot = Plot("Expected speed", Axis(0, LARGEST_K, "draft tokens K"), Axis(0, top * 1.08, "plain decode = 1"))
    for style, (kind, speeds) in zip(("a", "b", "c", "d", "e", "noise", "f"), found.expected.items(), strict=False):
        plot.line(sorted(speeds.items()), style, kind)
        plot.dots([(k, speeds[k]) for k in found.draft_tokens], style)
    plot.rule(1.0, "plain decode")
    measured = ", ".join(f"K={k}: {cost:.2f}" for k, cost in found.step_costs.items())
    figure = plot.svg("curve", f"Measured step costs, in plain steps: {measured}.")
    return plot_page(f"Tuning of {name}", name, [figure])


def write_recipe(path: Path, found: Tuning, *, paced: bool) -> None:
    """Write K, for a head that is `paced` its step costs, and the buckets into a recipe file that has these keys.

    Everything else in the file stays as it is.

    Raises:
        InputError: the file has no `draft_tokens` itself, or does not load with the measured values.

    """
    data = found.to_json()
    wanted = {name: data[name] for name in ("draft_tokens", "step_costs") if paced or name == "draft_tokens"}
    fix = "write " + " and ".join(f"{name}: {value}" for name, value in wanted.items())
    recipe = read_text(path)
    if not recipe.has("speculation", "draft_tokens"):
        raise InputError("has no `draft_tokens: [...]` to change", where=str(path), fix=fix)
    try:
        for name, value in wanted.items():
            recipe.put("speculation", name, value, behind="draft_tokens")
        for name in [name for name in found.shapes if recipe.has("shapes", name)]:
            recipe.put("shapes", name, found.shapes[name], behind=name)
        text = recipe.text()
    except InputError as error:
        raise InputError(error.what, where=str(path), fix=fix) from error
    try:
        _replace_file(path, text)
    except InputError as error:
        what = f"does not load with the measured values: {error.what}"
        raise InputError(what, where=str(path), fix=fix) from error


def _replace_file(path: Path, text: str) -> None:
    """Write a recipe's file anew, if it loads."""
    with atomic_file(path) as file:
        file.write(text.encode())
        file.flush()
        load(Path(file.name))
