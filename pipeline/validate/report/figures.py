"""Which plots the page shows, made from a report. Draws nothing itself and knows no HTML beyond captions. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from statistics import median

from pipeline.validate.limits import limits
from pipeline.validate.report.plots import Axis, Plot, axis
from pipeline.validate.report.schema import Acceptance, ModelParity, Report, Speed
from pipeline.validate.report.summaries import show

BINS = 40
LINKED = 10
CLASS_STYLES = ("a", "b", "c", "d", "e", "noise")


def figures(report: Report) -> Iterator[str]:
    """Every plot as HTML."""
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
    yield _bucket_map(report)


def _error_by_position(report: Report, model: str, of: ModelParity) -> str:
    points = of.points
    positions = points.position
    longest = max(positions, default=0) + 1
    width = max(-(-longest // BINS), 1)
    groups: dict[int, list[int]] = {}
    for row, position in enumerate(positions):
        groups.setdefault(position // width, []).append(row)
    centres = {group: (group + 0.5) * width - 0.5 for group in groups}
    errors, noises = _plain(points.error), _plain(points.noise)
    shown = [v for v in (*errors, *noises) if v > 0]
    plot = Plot(
        f"Error by position, {model}", Axis(0, longest, "position in the cache"),
        axis(shown, "error of the top 50, relative", log=True),
    )  # fmt: skip
    order = sorted(groups)
    quantiles = {
        g: (_quantile([noises[r] for r in groups[g]], 0.05), _quantile([noises[r] for r in groups[g]], 0.95))
        for g in order
    }
    plot.area(
        [(centres[g], quantiles[g][0]) for g in order],
        [(centres[g], quantiles[g][1]) for g in order],
        "noise",
        f"{of.dtype} noise, 5 to 95%",
    )
    plot.line([(centres[g], median(errors[r] for r in groups[g])) for g in order], "a", "artifact, median")
    plot.line([(centres[g], max(errors[r] for r in groups[g])) for g in order], "b", "artifact, largest")
    best_first = sorted(range(len(errors)), key=lambda row: errors[row])
    of_token = {(points.sequence[row], positions[row]): row for row in best_first}  # in its worst graph
    for row in sorted(of_token.values(), key=lambda row: -errors[row])[:LINKED]:
        plot.link(
            positions[row],
            errors[row],
            _anchor(points.sequence[row], positions[row]),
            _about(report, of, row, f"error {errors[row]:.2e}"),
            "b",
        )
    return plot.svg(f"plot-error-{model}", "Dots are the largest errors; each leads to its token.")


def _error_by_layer(model: str, of: ModelParity) -> str:
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
        "Keys and values that the artifact left in its caches. A fault shows at its layer first.",
    )


def _gaps(report: Report, model: str, of: ModelParity) -> str:
    points = of.points
    gaps = [max(g, 0.25) if g is not None and math.isfinite(g) else None for g in points.gap_ulp]
    exponents = [math.floor(math.log2(g)) if g is not None else None for g in gaps]
    known = [e for e in exponents if e is not None]
    low, high = (min(known), max(known) + 1) if known else (0, 1)
    counts = {e: known.count(e) for e in range(low, high)}
    step = max((high - low) // 6, 1)
    ticks = tuple((float(e), f"{2.0**e:g}") for e in range(low, high + 1, step))
    plot = Plot(
        f"Gap of the two best tokens, {model}",
        Axis(low, high, f"gap in units in the last place of {of.dtype}", ticks=ticks),
        axis([0.0, *map(float, counts.values())], "tokens", low=0.0),
    )  # fmt: skip
    for e, count in counts.items():
        plot.bar((e + 0.06, e + 0.94), count, "a", f"{count} tokens with a gap of {2.0**e:g} to {2.0 ** (e + 1):g} ULP")
    flipped = [row for row, flip in enumerate(points.flip) if flip]
    smallest = sorted((row for row, g in enumerate(gaps) if g is not None), key=lambda row: gaps[row] or 0.0)
    for number, row in enumerate(dict.fromkeys([*flipped[:LINKED], *smallest[:LINKED]])):
        gap = gaps[row] or 0.25
        style = {0: "noise", 1: "bad", 2: "e"}[points.flip[row]]
        height = plot.y.high * (0.9 - 0.055 * number)
        plot.link(
            math.log2(gap),
            height,
            _anchor(points.sequence[row], points.position[row]),
            _about(report, of, row, f"gap {show(points.gap_ulp[row])} ULP"),
            style,
        )
    plot.key("noise", "closest calls")
    if flipped:
        plot.key("e", "flipped near-ties")
        plot.key("bad", "flipped beyond")
    return plot.svg(
        f"plot-gap-{model}",
        f"{len(flipped)} of {of.tokens} tokens flip; a gap within the noise may flip in any right build. "
        "Dots, one below the other, lead to tokens.",
    )


def _acceptance_by_position(of: Acceptance) -> str:
    places = range(1, of.draft_tokens + 1)
    ticks = tuple((float(p), str(p)) for p in places)
    plot = Plot(
        f"Acceptance by place, K={of.draft_tokens}",
        Axis(0.7, of.draft_tokens + 0.3, "place of the draft token", ticks=ticks),
        Axis(0, 1, "share of steps that accept it"),
    )
    for style, (kind, figures_of) in zip(CLASS_STYLES, of.by_class.items(), strict=False):
        rows = list(zip(map(float, places), figures_of.accepted_by_position, strict=True))
        plot.line(rows, style, kind)
        plot.dots(rows, style)
    return plot.svg(f"plot-acceptance-{of.draft_tokens}", f"{of.tokens_per_step:.2f} tokens a step over all prompts.")


def _lengths(of: Acceptance) -> str:
    total = max(sum(of.lengths), 1)
    shares = [count / total for count in of.lengths]
    ticks = tuple((float(n), str(n)) for n in range(1, len(shares) + 1))
    plot = Plot(
        f"Tokens of a step, K={of.draft_tokens}",
        Axis(0.4, len(shares) + 0.6, "tokens that a step emits", ticks=ticks),
        axis([0.0, *shares], "share of steps", low=0.0),
    )
    for n, share in enumerate(shares, 1):
        plot.bar((n - 0.35, n + 0.35), share, "a", f"{of.lengths[n - 1]} steps emit {n}")
    return plot.svg(f"plot-lengths-{of.draft_tokens}", f"{total:,} steps.")


def _latencies(of: Speed) -> str:
    everything = [*of.plain.step_ms, *of.speculative.step_ms] or [1.0]
    low, high = min(everything) * 0.95, sorted(everything)[int(len(everything) * 0.98) - 1] * 1.1
    high = max(high, low * 1.2)
    size = (high - low) / 24
    plot = Plot("Time of a step", Axis(low, high, "milliseconds"), Axis(0, 1, "share of steps"))
    tallest = 0.0
    bars = []
    for name, style, latencies in (
        ("plain decode, one token", "a", of.plain),
        (f"speculation, K={of.draft_tokens}", "b", of.speculative),
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
        "the last bar holds all that is slower.",
    )


def _bucket_map(report: Report) -> str:
    """Graphs by KV bucket: what each was tested on. Not a drawing, but read like one."""
    tokens: dict[str, int] = {}
    for of in report.parity.values():
        for graph in of.points.graph:
            name = of.points.graphs[graph]
            tokens[name] = tokens.get(name, 0) + 1
    for edge in report.losslessness.edges:
        tokens[edge.graph] = tokens.get(edge.graph, 0) + edge.tokens
    tests = report.distribution.tests if report.distribution is not None else ()
    for test in tests:
        if test.test.startswith("rank"):
            tokens[test.graph] = tokens.get(test.graph, 0) + test.tokens
    bad = {d.graph for d in report.losslessness.differences if not d.near_tie}
    kinds = dict.fromkeys(name.replace(f"-s{kv}", "") for name in report.tested.graphs for kv in [_kv(name)])
    head = "".join(f"<th scope='col'>KV {kv}</th>" for kv in report.tested.kv)
    rows = "".join(
        f"<tr><th scope='row'><code>{escape(kind)}</code></th>"
        + "".join(_cell(report, kind, kv, tokens, bad) for kv in report.tested.kv)
        + "</tr>"
        for kind in kinds
    )
    return (
        "<figure id='plot-map' class='plot'><h3>Map of graphs and KV buckets</h3>"
        "<div class='scroll' tabindex='0' role='region' aria-label='Map of buckets'>"
        f"<table class='map'><thead><tr><th scope='col'>graph</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><figcaption>Tokens on which each shipped graph was compared; "
        "decode and prefill graphs also ran all prompts.</figcaption></figure>"
    )


def _cell(report: Report, kind: str, kv: int, tokens: dict[str, int], bad: set[str]) -> str:
    match = [name for name in report.tested.graphs if _kv(name) == kv and name.replace(f"-s{kv}", "") == kind]
    if not match:
        return "<td></td>"
    style = "bad-cell" if match[0] in bad else "hit-cell"
    return f"<td class='{style}'>{tokens.get(match[0]) or '✓'}</td>"


def _kv(graph: str) -> int:
    return next(int(part[1:]) for part in graph.split("-") if part[0] == "s" and part[1:].isdigit())


def _anchor(sequence: int, position: int) -> str:
    return f"t-{sequence}-{position}"


def _about(report: Report, of: ModelParity, row: int, what: str) -> str:
    points = of.points
    sequence = report.sequences[points.sequence[row]]
    return f"{sequence.name}, position {points.position[row]}, {points.graphs[points.graph[row]]}: {what}"


def _plain(values: Sequence[float | None]) -> list[float]:
    return [0.0 if v is None else v for v in values]


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
