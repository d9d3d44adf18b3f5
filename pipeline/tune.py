"""Measure what a pair's steps cost here and what they gain, and say which K and which buckets to build.

Every prompt is answered in turn by plain decode and by each K that was built, so costs are ratios of one run. A step's
cost is fitted as a straight line over K; tokens of a step follow from the acceptance rates (Leviathan et al. 2023).
Prompts and answers have lengths; the few buckets that pad them least follow from those (`buckets.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import accumulate, pairwise
from operator import mul
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.buckets import buckets_for, padded
from pipeline.errors import InputError
from pipeline.files import write_atomic

if TYPE_CHECKING:
    from pipeline.runtime.engine import Engine
    from pipeline.validate.prompts import Prompt

LARGEST_K = 8
MOST_PREFILL, MOST_KV = 3, 2
"""Buckets at most: each is a graph for every batch and phase."""

PENALTY = 0.02
"""A further K must gain more than this share on some class to be worth the time that its graphs take to compile."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tuning:
    """What was measured. `step_costs` by K built, in plain steps; `rates` of acceptance given those before."""

    step_costs: dict[int, float]
    rates: dict[str, list[float]]
    draft_tokens: list[int]
    expected: dict[str, dict[int, float]] = field(default_factory=dict)
    """Tokens per plain step's time, by prompt class (`all` first) and K."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """`prefill` and `kv` buckets."""
    padding: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tokens run over tokens there are, with the buckets of now and with those of `shapes`."""

    def cost(self, k: int) -> float:
        """Cost of any K, on the line through plain decode and what was measured."""
        if k in self.step_costs:
            return self.step_costs[k]
        slope, base = _line(sorted(self.step_costs.items()))
        return 1.0 if k == 0 else base + slope * k

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        costs = [round(self.cost(k), 3) for k in self.draft_tokens]
        measured = {str(k): cost for k, cost in self.step_costs.items()}
        return {"draft_tokens": self.draft_tokens, "step_costs": costs, "measured_costs": measured,
                "accepted_given_previous": self.rates, "expected_speed": self.expected,
                "shapes": self.shapes, "padding": self.padding}  # fmt: skip


def tune(engine: Engine, prompts: Sequence[Prompt], prompts_per_class: int, tokens: int, say: Say) -> Tuning:
    """Measure a loaded artifact.

    Raises:
        InputError: no answer has a step.

    """
    from pipeline.validate.acceptance import acceptance, timed

    chosen = _spread(prompts, prompts_per_class)
    built = list(engine.manifest.draft_tokens)
    gaps: dict[int, list[float]] = {k: [] for k in (0, *built)}
    answers = []
    for number, prompt in enumerate(chosen):
        encoded = engine.text.chat(prompt.text) if engine.text.has_chat else engine.text.encode(prompt.text)
        for k in gaps:
            if number == 0:  # graphs are opened on first use
                timed(engine, encoded, 8, k or None)
            arrivals, answer = timed(engine, encoded, tokens, k or None)
            gaps[k] += [b - a for a, b in pairwise(arrivals)]
            if k == built[-1]:
                answers.append(answer)
        say(f"{number + 1} of {len(chosen)} prompts")
    if not all(gaps.values()):
        what = "every answer ended with its first token: there is no step to measure"
        raise InputError(what, where="tune", fix="use other prompts, or more --max-new-tokens")
    plain = median(gaps.pop(0))
    costs = {k: median(of) / plain for k, of in gaps.items()}
    rates = {"all": acceptance(chosen, answers, built[-1])["accepted_given_previous"]}
    for kind in dict.fromkeys(prompt.kind for prompt in chosen):
        of = [(p, a) for p, a in zip(chosen, answers, strict=True) if p.kind == kind]
        rates[kind] = acceptance([p for p, _ in of], [a for _, a in of], built[-1])["accepted_given_previous"]
    return replace(choose(costs, rates), **_shapes(engine, prompts, tokens))


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
    from pipeline.validate.page import document
    from pipeline.validate.plots import Axis, Plot

    top = max(max(speeds.values()) for speeds in found.expected.values())
    plot = Plot("Expected speed", Axis(0, LARGEST_K, "draft tokens K"), Axis(0, top * 1.08, "plain decode = 1"))
    for style, (kind, speeds) in zip(("a", "b", "c", "d", "e", "noise"), found.expected.items(), strict=False):
        plot.line(sorted(speeds.items()), style, kind)
        plot.dots([(k, speeds[k]) for k in found.draft_tokens], style)
    plot.rule(1.0, "plain decode")
    measured = ", ".join(f"K={k}: {cost:.2f}" for k, cost in found.step_costs.items())
    figure = plot.svg("curve", f"Measured step costs, in plain steps: {measured}.")
    return document(f"Tuning of {name}", [f"<main id='main'><h1>{escape(name)}</h1>", figure, "</main>"])


def write_recipe(path: Path, found: Tuning, *, paced: bool) -> None:
    """Put K, for a head that is `paced` its costs, and the buckets that a recipe file writes itself into it.

    Everything else in it stays as it is.

    Raises:
        InputError: the file does not write `draft_tokens: [...]` itself.

    """
    text = path.read_text()
    data = found.to_json()
    wanted = f"draft_tokens: {data['draft_tokens']}"
    costs = f"step_costs: {data['step_costs']}"
    known = re.search(r"^(?P<indent>\s*)(?P<before>.*?)draft_tokens:\s*\[[^\]]*\]", text, re.MULTILINE)
    if known is None:
        raise InputError("has no `draft_tokens: [...]` to change", where=str(path), fix=f"write {wanted} and {costs}")
    text = re.sub(r",?[ \t]*\n?[ \t]*step_costs:\s*\[[^\]]*\]", "", text)
    between = ", " if "{" in known["before"] else "\n" + known["indent"].lstrip("\n")
    new = f"{wanted}{between}{costs}" if paced else wanted
    text = re.sub(r"draft_tokens:\s*\[[^\]]*\]", new, text, count=1)
    for name, buckets in found.shapes.items():
        text = re.sub(rf"\b{name}:\s*\[[^\]]*\]", f"{name}: {buckets}", text, count=1)
    write_atomic(path, text.encode())
