"""The plots of the page, made from a report. Contains no drawing code and no HTML except captions. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from pipeline.validate.limits import limits
from pipeline.validate.report.plots import Axis, Link, Plot, axis
from pipeline.validate.report.schema import Acceptance, ModelParity, Report, Speed
from pipeline.validate.report.summaries import show

BINS = 40
LINKED = 10
FLIP_STYLES = {0: "noise", 1: "bad", 2: "e"}
"""Styles of dots, by `Points.flip`."""

CLASS_STYLES = ("a", "b", "c", "d", "e", "noise")


def figures(report: Report) -> Iterator[Markup]:
    """Yield every plot."""
    for model, of in report.parity.items():
        yield _error_by_position(report, model, of)
    for model, of in report.parity.items():
        if of.layers:
            yield _error_by_layer(model, of)
    for model, of in report.parity.items():
        yield _gaps(report, model, of)
    for acceptance in report.acceptance:
        yield _acceptance_by_position(acceptance)
        yield _lengths(acceptance)
    yield _latencies(report.speed)


def _error_by_position(report: Report, model: str, of: ModelParity) -> Markup:
    points = of.points
    errors, noises = _plain(points.error), _plain(points.noise)
    longest = max(points.position, default=0) + 1
    plot = Plot(
        f"Error by position, {model}",
        Axis(0, longest, "position in the cache"),
        axis([v for v in (*errors, *noises) if v > 0], "error of the top 50, relative", log=True),
    )
    bins = _by_position(points.position, longest)
    noise_bins = [(centre, [noises[row] for row in rows]) for centre, rows in bins]
    low, high = ([(centre, _quantile(values, share)) for centre, values in noise_bins] for share in (0.05, 0.95))
    plot.area(low, high, "noise", f"{of.dtype} noise, 5 to 95%")
    plot.line([(centre, median(errors[row] for row in rows)) for centre, rows in bins], "a", "artifact, median")
    plot.line([(centre, max(errors[row] for row in rows)) for centre, rows in bins], "b", "artifact, largest")
    for row in _worst_tokens(of, errors):
        plot.link(points.position[row], errors[row], _link(report, of, row, f"error {errors[row]:.2e}"), "b")
    return plot.svg(f"plot-error-{model}", "Dots are the largest errors and link to their tokens.")


def _by_position(positions: Sequence[int], longest: int) -> list[tuple[float, list[int]]]:
    """Return rows in bins of neighbouring positions, each with its centre."""
    width = max(-(-longest // BINS), 1)
    bins: dict[int, list[int]] = {}
    for row, position in enumerate(positions):
        bins.setdefault(position // width, []).append(row)
    return [((number + 0.5) * width - 0.5, bins[number]) for number in sorted(bins)]


def _worst_tokens(of: ModelParity, errors: Sequence[float]) -> list[int]:
    """Return rows of the tokens with the largest errors, each in its worst graph."""
    points = of.points
    best_first = sorted(range(len(errors)), key=lambda row: errors[row])
    of_token = {(points.sequence[row], points.position[row]): row for row in best_first}
    return sorted(of_token.values(), key=lambda row: -errors[row])[:LINKED]


def _error_by_layer(model: str, of: ModelParity) -> Markup:
    columns = [[math.inf if value is None else value for value in column] for column in zip(*of.layers, strict=True)]
    keys, values = columns
    limit = limits(of.dtype).layer
    top = max([limit * 1.07, *(v for v in (*keys, *values) if math.isfinite(v))]) * 1.1
    last = max(len(keys) - 1, 1)
    ticks = tuple((float(n), str(n)) for n in range(0, last + 1, -(-last // 8)))
    plot = Plot(f"Error by layer, {model}", Axis(0, last, "layer", ticks=ticks), Axis(0, top, "error over noise"))
    plot.rule(1.0, f"{of.dtype} noise", "usual")
    plot.rule(limit, "limit")
    for name, style, column in (("keys", "a", keys), ("values", "c", values)):
        plot.line([(i, min(v, top)) for i, v in enumerate(column)], style, name)
        plot.dots([(i, min(v, top)) for i, v in enumerate(column)], style)
    return plot.svg(
        f"plot-layers-{model}",
        "Keys and values in the artifact's caches. A fault shows first at its own layer.",
    )


def _gaps(report: Report, model: str, of: ModelParity) -> Markup:
    points = of.points
    gaps = [max(g, 0.25) if g is not None and math.isfinite(g) else None for g in points.gap_ulp]
    counts = _by_exponent([g for g in gaps if g is not None])
    low, high = min(counts, default=0), max(counts, default=0) + 1
    step = max((high - low) // 6, 1)
    ticks = tuple((float(e), f"{2.0**e:g}") for e in range(low, high + 1, step))
    plot = Plot(
        f"Gap of the two best tokens, {model}",
        Axis(low, high, f"gap in units in the last place of {of.dtype}", ticks=ticks),
        axis([0.0, *map(float, counts.values())], "tokens", low=0.0),
    )
    for e, count in counts.items():
        plot.bar((e + 0.06, e + 0.94), count, "a", f"{count} tokens with a gap of {2.0**e:g} to {2.0 ** (e + 1):g} ULP")
    flipped = [row for row, flip in enumerate(points.flip) if flip]
    smallest = sorted((row for row, g in enumerate(gaps) if g is not None), key=lambda row: gaps[row] or 0.0)
    for number, row in enumerate(dict.fromkeys([*flipped[:LINKED], *smallest[:LINKED]])):
        link = _link(report, of, row, f"gap {show(points.gap_ulp[row])} ULP")
        height = plot.y.high * (0.9 - 0.055 * number)
        plot.link(math.log2(gaps[row] or 0.25), height, link, FLIP_STYLES[points.flip[row]])
    plot.key("noise", "smallest gaps")
    if flipped:
        plot.key("e", "flips at near-ties")
        plot.key("bad", "flips beyond near-ties")
    return plot.svg(
        f"plot-gap-{model}",
        f"{len(flipped)} of {of.tokens} tokens flip; a gap within the noise may flip in any correct build. "
        "Dots link to tokens.",
    )


def _by_exponent(gaps: Sequence[float]) -> dict[int, int]:
    """Count gaps by power of two, without holes."""
    exponents = Counter(math.floor(math.log2(gap)) for gap in gaps)
    return {e: exponents[e] for e in range(min(exponents), max(exponents) + 1)} if exponents else {0: 0}


def _acceptance_by_position(of: Acceptance) -> Markup:
    places = range(1, of.draft_tokens + 1)
    ticks = tuple((float(p), str(p)) for p in places)
    plot = Plot(
        f"Acceptance by position (K={of.draft_tokens})",
        Axis(0.7, of.draft_tokens + 0.3, "position of the draft token", ticks=ticks),
        Axis(0, 1, "share of steps that accept it"),
    )
    for style, (kind, measured) in zip(CLASS_STYLES, of.by_class.items(), strict=False):
        rows = list(zip(map(float, places), measured.accepted_by_position, strict=True))
        plot.line(rows, style, kind)
        plot.dots(rows, style)
    return plot.svg(f"plot-acceptance-{of.draft_tokens}", f"{of.tokens_per_step:.2f} tokens per step over all prompts.")


def _lengths(of: Acceptance) -> Markup:
    total = max(sum(of.lengths), 1)
    shares = [count / total for count in of.lengths]
    ticks = tuple((float(n), str(n)) for n in range(1, len(shares) + 1))
    plot = Plot(
        f"Tokens per step (K={of.draft_tokens})",
        Axis(0.4, len(shares) + 0.6, "tokens of a step", ticks=ticks),
        axis([0.0, *shares], "share of steps", low=0.0),
    )
    for n, share in enumerate(shares, 1):
        plot.bar((n - 0.35, n + 0.35), share, "a", f"{of.lengths[n - 1]} steps emit {n}")
    return plot.svg(f"plot-lengths-{of.draft_tokens}", f"{total:,} steps.")


def _latencies(of: Speed) -> Markup:
    everything = [*of.plain.step_ms, *of.speculative.step_ms] or [1.0]
    low, high = min(everything) * 0.95, sorted(everything)[int(len(everything) * 0.98) - 1] * 1.1
    high = max(high, low * 1.2)
    size = (high - low) / 24
    plot = Plot("Step time", Axis(low, high, "milliseconds"), Axis(0, 1, "share of steps"))
    tallest = 0.0
    bars = []
    for name, style, latencies in (
        ("plain decode", "a", of.plain),
        (f"speculation (K={of.draft_tokens})", "b", of.speculative),
    ):
        counts = [0] * 24
        for value in latencies.step_ms:
            counts[min(max(int((value - low) / size), 0), 23)] += 1
        shares = [count / max(len(latencies.step_ms), 1) for count in counts]
        tallest = max(tallest, *shares)
        bars.append((name, style, shares))
    plot.y = Axis(0, tallest * 1.1 or 1.0, "share of steps")
    for name, style, shares in bars:
        plot.key(style, name)
        for n, share in enumerate(shares):
            if share:
                plot.bar(
                    (low + n * size, low + (n + 0.9) * size),
                    share,
                    style,
                    f"{name}: {share:.0%} at {low + n * size:.1f} to {low + (n + 1) * size:.1f} ms",
                )
    return plot.svg(
        "plot-latency",
        f"Medians {show(of.plain.step_p50_ms)} and {show(of.speculative.step_p50_ms)} ms; "
        "the last bar includes all slower steps.",
    )


@dataclass(frozen=True)
class BucketCell:
    """A graph in one KV bucket: on how many tokens it was compared, and whether it differed."""

    tokens: int
    is_faulty: bool


@dataclass(frozen=True)
class BucketRow:
    """Graphs that differ in their KV bucket only: a cell for each bucket, None where there is no such graph."""

    graphs: str
    cells: tuple[BucketCell | None, ...]


def bucket_map(report: Report) -> list[BucketRow]:
    """Return the tests of each graph, by KV bucket."""
    tokens = _tokens_compared(report)
    faulty = {d.graph for d in report.losslessness.differences if not d.near_tie}
    rows: dict[str, dict[int, BucketCell]] = {}
    for name in report.tested.graphs:
        kv = _kv(name)
        cell = BucketCell(tokens[name], name in faulty)
        rows.setdefault(name.replace(f"-s{kv}", ""), {})[kv] = cell
    return [BucketRow(name, tuple(cells.get(kv) for kv in report.tested.kv)) for name, cells in rows.items()]


def _tokens_compared(report: Report) -> Counter[str]:
    """Count the tokens on which each graph was compared."""
    tokens: Counter[str] = Counter()
    for of in report.parity.values():
        tokens.update(of.points.graphs[graph] for graph in of.points.graph)
    for edge in report.losslessness.edges:
        tokens[edge.graph] += edge.tokens
    for test in report.distribution.tests if report.distribution is not None else ():
        if test.test.startswith("rank"):
            tokens[test.graph] += test.tokens
    return tokens


def _kv(graph: str) -> int:
    return next(int(part[1:]) for part in graph.split("-") if part[0] == "s" and part[1:].isdigit())


def token_anchor(sequence: int, position: int) -> str:
    """Return the anchor of a token, by the number of its sequence."""
    return f"t-{sequence}-{position}"


def _link(report: Report, of: ModelParity, row: int, what: str) -> Link:
    """Return a link to the token of a row, with its label."""
    points = of.points
    number, position, graph = points.sequence[row], points.position[row], points.graphs[points.graph[row]]
    label = f"{report.sequences[number].name}, position {position}, {graph}: {what}"
    return Link(token_anchor(number, position), label)


def _plain(values: Sequence[float | None]) -> list[float]:
    return [0.0 if v is None else v for v in values]


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
