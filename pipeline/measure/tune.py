"""Measure the cost and the gain of a pair's steps on this host, and choose K and buckets to build.

In every batch bucket plain decode and each K of the artifact take steps in turn, so costs are ratios of one run. A
step's cost is fitted as a straight line over K; its tokens follow from the acceptance rates (Leviathan et al. 2023).
The buckets that pad the lengths of prompts and answers least follow from those lengths (`buckets.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Arguments, StepRow, step_arguments
from pipeline.measure.buckets import KV_MULTIPLE, PREFILL_MULTIPLE, buckets_for, padded
from pipeline.progress import Log, Progress, no_progress
from pipeline.recipe.edit import read_text
from pipeline.recipe.write import Change, change_recipe

if TYPE_CHECKING:
    from pipeline.graphs.spec import GraphSpec
    from pipeline.runtime.calls import Generation
    from pipeline.runtime.engine import Engine
    from pipeline.validate.prompts import Prompt

LARGEST_K = 8
QUARTERS = 4
"""Parts of the longest cache whose costs are measured, where attention reads the cached keys alone."""

TURNS, STEPS = 5, 6
"""Turns of each K, and steps of a turn, when steps are timed."""

MOST_PREFILL, MOST_KV = 3, 2
"""Buckets at most: each is a graph for every batch and phase."""

PENALTY = 0.02
"""Share that a further K must gain on some class to be worth the compile time of its graphs."""


@dataclass(frozen=True)
class Tuning:
    """The measurements. `step_costs` by K of the artifact, in decode steps, in the smallest batch bucket with the
    shortest caches; `by_shape` in every bucket, by the cached tokens up to which they hold; `rates` are acceptance
    rates, each given that the drafts before were accepted.
    """

    step_costs: dict[int, float]
    rates: dict[str, list[float]]
    draft_tokens: list[int]
    expected: dict[str, dict[int, float]] = field(default_factory=dict)
    """Tokens per time of a decode step, by prompt class (`all` first; `copies`, of steps with a copy, last) and K."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """`prefill` and `kv` buckets."""
    by_shape: dict[int, dict[int, dict[int, float]]] = field(default_factory=dict)
    padding: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Padding overhead (tokens run over tokens needed), with the present buckets and with those of `shapes`."""

    def cost(self, k: int) -> float:
        """Return the cost of any K in the smallest batch, on the line through plain decode and the measured costs."""
        return _cost(self.step_costs, k)

    def schedule(self) -> list[list[int]]:
        """Return the K of `draft_tokens`, or 0, that is best on average over all prompts for numbers of requests.

        As vLLM's `num_speculative_tokens_per_batch_size`: [first, last, K]. Costs are means over lengths of caches.
        """
        found: list[list[int]] = []
        for batch, by_tokens in self.by_shape.items():
            speeds = {
                k: tokens_of(self.rates["all"], k) / mean(_cost(of, k) for of in by_tokens.values())
                for k in (0, *self.draft_tokens)
            }
            best = max(speeds, key=lambda k: speeds[k])
            if found and found[-1][2] == best:
                found[-1][1] = batch
            else:
                found.append([found[-1][1] + 1 if found else 1, batch, best])
        return found

    def _step_costs(self) -> Any:
        """Return costs of `draft_tokens` in the shortest form of a recipe's `step_costs`."""
        listed: dict[int, Any] = {}
        for batch, by_tokens in self.by_shape.items():
            of = {tokens: [round(_cost(costs, k), 3) for k in self.draft_tokens] for tokens, costs in by_tokens.items()}
            listed[batch] = of if len(of) > 1 else next(iter(of.values()))
        alone = next(iter(listed.values()))
        return alone if len(listed) == 1 and isinstance(alone, list) else listed

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as plain data."""
        measured = {str(k): cost for k, cost in self.step_costs.items()}
        return {"draft_tokens": self.draft_tokens, "step_costs": self._step_costs(), "measured_costs": measured,
                "num_speculative_tokens_per_batch_size": self.schedule(),
                "accepted_given_previous": self.rates, "expected_speed": self.expected,
                "shapes": self.shapes, "padding": self.padding}  # fmt: skip


def tune(
    engine: Engine,
    prompts: Sequence[Prompt],
    prompts_per_class: int,
    tokens: int,
    log: Log,
    progress: Progress = no_progress,
) -> Tuning:
    """Measure a loaded artifact.

    Raises:
        InputError: no answer has a step.

    """
    from pipeline.validate.lengths import cut_warning, longest_prompt

    no_string(prompts, "prompts", "prompts")
    chosen = _spread(prompts, prompts_per_class)
    built = list(engine.manifest.draft_tokens)
    costs = {batch: _costs_by_tokens(engine, batch, progress) for batch in engine.manifest.shapes.batch}
    log(f"measured steps of {len(costs)} batch bucket{'s' if len(costs) > 1 else ''}")
    longest = longest_prompt(engine.manifest.shapes, tokens)
    whole = [engine.text.encode_prompt(prompt.text) for prompt in chosen]
    if warning := cut_warning([len(encoded) for encoded in whole], engine.manifest.shapes, tokens):
        log(warning)
    answers = []
    for number, encoded in enumerate(whole):
        progress("prompts", number, len(whole))
        answers += engine.generate([encoded[-longest:]], max_new_tokens=tokens, temperature=0.0, draft_tokens=built[-1])
    progress("prompts", 1, 1)
    if not any(answer.emitted_per_step for answer in answers):
        what = "every answer ended with its first token: no step to measure"
        raise InputError(what, where="tune", fix="use other prompts, or more --max-new-tokens")
    return replace(choose(costs, _rates(chosen, answers, built[-1])), **_shapes(engine, prompts, tokens))


def _rates(prompts: Sequence[Prompt], answers: Sequence[Generation], k: int) -> dict[str, list[float]]:
    """Return acceptance rates of k drafts over all prompts, by class, and in steps with copied tokens."""
    from pipeline.validate.gates.acceptance import acceptance_of, given_previous

    rates = {"all": list(acceptance_of(prompts, answers, k).accepted_given_previous)}
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        of = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.kind == kind]
        rates[kind] = list(acceptance_of([p for p, _ in of], [a for _, a in of], k).accepted_given_previous)
    steps = [step for answer in answers for step in zip(answer.emitted_per_step, answer.copied_per_step, strict=True)]
    if copied := [emitted for emitted, copies in steps if copies]:
        rates["copies"] = given_previous(copied, k)
    return rates


def _costs_by_tokens(engine: Engine, batch: int, progress: Progress) -> dict[int, dict[int, float]]:
    """Return the costs of steps in a batch bucket, by the cached tokens up to which they hold, then by K.

    A graph that reads all keys of its bucket takes as long for any cache in it; on a CPU attention reads the cached
    keys alone, so quarters of the longest cache are measured in their middle.
    """
    lengths = engine.manifest.shapes.kv
    if not _reads_all(engine):
        lengths = tuple(lengths[-1] * part // QUARTERS for part in range(1, QUARTERS + 1))
    found = {}
    for number, (before, tokens) in enumerate(zip((0, *lengths), lengths, strict=False)):
        progress(f"steps of {batch}", number, len(lengths))
        found[tokens] = _costs(engine, batch, (before + tokens) // 2)
    progress(f"steps of {batch}", 1, 1)
    return found


def _reads_all(engine: Engine) -> bool:
    """Return whether attention reads all keys of a bucket, the valid ones or not."""
    return engine.manifest.requires.get("device") != "cpu"


def _costs(engine: Engine, batch: int, position: int) -> dict[int, float]:
    """Return the cost of a step for each K, in decode steps, with all rows of a batch bucket at a position."""
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
    """Return the arguments of a step with all rows of a graph, caches filled up to a position."""
    row = StepRow(position % engine.manifest.vocab, position)
    return step_arguments(graph, dict.fromkeys(range(graph.batch), row))


def _shapes(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Return buckets for all prompts with answers of up to `tokens` tokens, and their padding."""
    text, now = engine.text, engine.manifest.shapes
    lengths = Counter(len(text.encode_prompt(p.text)) for p in prompts)
    ends = Counter({length + tokens: count for length, count in lengths.items()})
    reads_all = _reads_all(engine)
    shapes = {
        "prefill": buckets_for(lengths, now.prefill[-1], MOST_PREFILL, PREFILL_MULTIPLE),
        "kv": buckets_for(ends, now.kv[-1], MOST_KV, KV_MULTIPLE) if reads_all else [now.kv[-1]],
    }
    total = sum(min(length, now.prefill[-1]) for length in lengths.elements())
    padding = {"prefill": (padded(lengths, now.prefill) / total, padded(lengths, shapes["prefill"]) / total)}
    if reads_all:
        needed = sum(ends.elements())
        padding["kv"] = padded(ends, now.kv) / needed, padded(ends, shapes["kv"]) / needed
    return {"shapes": shapes, "padding": padding}


def choose(by_shape: dict[int, dict[int, dict[int, float]]], rates: dict[str, list[float]]) -> Tuning:
    """Choose K to build: the best over all prompts, and others that speed up a class of prompts.

    `by_shape`: costs by batch bucket, cached tokens and K, from the smallest on.
    """
    by_tokens = next(iter(by_shape.values()))
    costs = next(iter(by_tokens.values()))
    measured = Tuning(costs, rates, [])
    expected = {
        kind: {k: tokens_of(of, k) / measured.cost(k) for k in range(LARGEST_K + 1)} for kind, of in rates.items()
    }
    chosen: list[int] = []
    for speeds in expected.values():
        best = max(range(1, LARGEST_K + 1), key=lambda k: speeds[k])
        best_chosen = max((speeds[k] for k in chosen), default=0.0)
        if not chosen or speeds[best] > max(best_chosen, 1.0) * (1 + PENALTY):
            chosen.append(best)
    return Tuning(costs, rates, sorted(chosen), expected, by_shape=by_shape)


def tokens_of(rates: Sequence[float], k: int) -> float:
    """Return the expected tokens of a step with K drafts; positions past the last measured one repeat its rate."""
    every = [*rates, *[rates[-1]] * k][:k]
    return 1 + sum(accumulate(every, mul))


def _cost(measured: dict[int, float], k: int) -> float:
    if k in measured:
        return measured[k]
    slope, base = _line(sorted(measured.items()))
    return 1.0 if k == 0 else base + slope * k


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return slope and base of a least-squares line; with one point, of the line through plain decode's cost of 1."""
    if len(points) == 1:
        (k, cost), base = points[0], 1.0
        return (cost - base) / k, base
    ks, costs = [k for k, _ in points], [cost for _, cost in points]
    mean_k, mean_cost = sum(ks) / len(ks), sum(costs) / len(costs)
    slope = sum((k - mean_k) * (cost - mean_cost) for k, cost in points) / sum((k - mean_k) ** 2 for k in ks)
    return slope, mean_cost - slope * mean_k


def _spread(prompts: Sequence[Prompt], per_class: int) -> list[Prompt]:
    """Return the first prompts of each class."""
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    return [prompt for kind in kinds for prompt in [p for p in prompts if p.kind == kind][:per_class]]


def curve(tuning: Tuning, name: str) -> str:
    """Return a page with the expected speed over K, one line per class."""
    from pipeline.validate.report.page import plot_page
    from pipeline.validate.report.plots import Axis, Plot

    top = max(max(speeds.values()) for speeds in tuning.expected.values())
    plot = Plot("Expected speed", Axis(0, LARGEST_K, "draft tokens K"), Axis(0, top * 1.08, "plain decode = 1"))
    for style, (kind, speeds) in zip(("a", "b", "c", "d", "e", "noise", "f"), tuning.expected.items(), strict=False):
        plot.line(sorted(speeds.items()), style, kind)
        plot.dots([(k, speeds[k]) for k in tuning.draft_tokens], style)
    plot.rule(1.0, "plain decode")
    measured = ", ".join(f"K={k}: {cost:.2f}" for k, cost in tuning.step_costs.items())
    figure = plot.svg("curve", f"Measured step costs, in decode steps: {measured}.")
    return plot_page(f"Tuning of {name}", name, [figure])


def write_recipe(path: Path, tuning: Tuning, *, paced: bool) -> None:
    """Write K, step costs if `paced`, and the buckets into a recipe file that has these keys.

    The rest of the file does not change.

    Raises:
        InputError: the file has no `draft_tokens` itself, or does not load with the measured values.

    """
    data = tuning.to_json()
    values = {name: data[name] for name in ("draft_tokens", "step_costs") if paced or name == "draft_tokens"}
    fix = "write " + " and ".join(f"{name}: {value}" for name, value in values.items())
    recipe = read_text(path)
    if not recipe.has("speculation", "draft_tokens"):
        raise InputError("the file has no `draft_tokens: [...]` to change", where=str(path), fix=fix)
    changes = [Change("speculation", name, value, behind="draft_tokens") for name, value in values.items()]
    own = [name for name in tuning.shapes if recipe.has("shapes", name)]
    changes += [Change("shapes", name, tuning.shapes[name], behind=name) for name in own]
    change_recipe(path, changes, fix)
