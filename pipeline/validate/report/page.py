"""The report as one page: verdict, what was tested, plots, tables, prompts, provenance. Opens offline. No torch.

Everything is in the file: style, script and drawings. Any dot in a plot leads to the prompt and token behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources

from pipeline.validate.report.figures import figures
from pipeline.validate.report.schema import Gate, ModelParity, Report, TokenSequence
from pipeline.validate.report.summaries import headlines, show

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
SECTIONS = {"parity": "parity", "losslessness": "losslessness", "distribution": "sampling", "acceptance": "acceptance"}
SHOWN_SLICES = 12
SHOWN_DIFFERENCES = 50


def render(report: Report) -> str:
    """The page, a complete HTML document."""
    return document(
        f"{report.name} {report.version}: parity report",
        [
            _header(report),
            "<main id='main'>",
            _glance(report),
            _tested(report),
            "<h2 id='plots'>Figures</h2><div class='plots'>", *figures(report), "</div>",
            *_tables(report),
            *_prompts(report),
            _provenance(report),
            "</main>",
        ],
    )  # fmt: skip


def document(title: str, body: Sequence[str]) -> str:
    """A self-contained HTML document."""
    folder = resources.files("pipeline.validate.report")
    style, script = ((folder / name).read_text() for name in ("page.css", "page.js"))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style></head><body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            *body,
            f"<script>{script}</script></body></html>",
        ]
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], name: str, *, numbers: int = 1) -> str:
    """A table of cells that are HTML already; the first `numbers` columns are text, the others numbers."""
    kinds = ["" if index < numbers else ' class="n"' for index in range(len(heads))]
    head = "".join(f"<th scope='col'{kind}>{text}</th>" for text, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(name)}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def verdict(passed: bool, text: str, findings: Sequence[str]) -> str:
    """The banner at the top."""
    kind = "passed" if passed else "failed"
    listed = "".join(f"<li>{escape(what)}</li>" for what in findings[:6])
    more = f"<li>and {len(findings) - 6} more, see below</li>" if len(findings) > 6 else ""
    return (
        f"<div class='verdict {kind}' id='verdict'><strong>{escape(text)}</strong>"
        + (f"<ul>{listed}{more}</ul>" if findings else "")
        + "</div>"
    )


def _header(report: Report) -> str:
    ranked = sorted(
        (n, i, gate.name, what) for i, gate in enumerate(report.gates) for n, what in enumerate(gate.findings)
    )
    findings = [f"{name}: {what}" for _, _, name, what in ranked]  # the first of each gate, then the second, ...
    text = (
        "Passed: this artifact is numerically its model, and speculation is lossless"
        if report.passed
        else "Failed: do not release this artifact"
    )
    marks = "".join(
        f"<li><a href='#{SECTIONS.get(gate.name, 'glance')}'>{_mark(gate)} {escape(gate.name)}</a></li>"
        for gate in report.gates
    )
    return (
        f"<header><h1>{escape(report.name)}</h1><p class='soft'>Numerical parity report of version "
        f"<code>{escape(report.version)}</code>, built {escape(report.provenance.created)}</p>"
        f"{verdict(report.passed, text, findings)}<ul class='gates' aria-label='Gates'>{marks}</ul></header>"
    )


def _mark(gate: Gate) -> str:
    return "<span class='mark passed'>✓</span>" if gate.passed else "<span class='mark failed'>✗</span>"


def _glance(report: Report) -> str:
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in headlines(report)
    )
    return f"<h2 id='glance'>At a glance</h2><dl class='figures'>{cells}</dl>"


def _tested(report: Report) -> str:
    t = report.tested
    tokens = sum(of.tokens for of in report.parity.values())
    cut = (
        f" Of {len(t.cut_prompts)} prompts, longer than the largest prefill bucket, the ends ran: "
        f"{escape(', '.join(t.cut_prompts))}."
        if t.cut_prompts
        else ""
    )
    return (
        "<h2 id='tested'>What was tested</h2><div class='card'>"
        f"<p>{len(t.graphs)} shipped graphs: batch {_list(t.batch)}, prefill {_list(t.prefill)}, KV {_list(t.kv)}, "
        f"K {_list(t.draft_tokens)}, {_list(t.sampling)}, ranks {t.ranks}, {escape(t.dtype)}.</p>"
        f"<p>{t.prompts} prompts of {len(t.classes)} classes ({escape(', '.join(t.classes))}) and, in every KV bucket, "
        f"probes that fill the cache to its last position: {tokens:,} tokens teacher-forced against transformers, "
        f"{report.losslessness.tokens:,} "
        f"compared with plain decode.{cut}</p>"
        "<p class='soft'>The baseline is transformers one precision above the recipe's dtype, on the same weights; "
        "<em>noise</em> is transformers in that dtype, so an error of 1.0 is what the dtype itself costs.</p></div>"
    )


def _list(values: Sequence[object]) -> str:
    return escape(", ".join(map(str, values)))


def _tables(report: Report) -> Iterator[str]:
    yield "<h2 id='gates'>Gates</h2>"
    rows = [
        (
            f"{_mark(gate)} {escape(gate.name)}",
            "<br>".join(map(escape, gate.findings)) or "<span class='soft'>nothing found</span>",
        )
        for gate in report.gates
    ]
    yield table(("gate", "findings"), rows, "Gates", numbers=2)
    yield "<h2 id='parity'>Parity</h2>"
    for model, of in report.parity.items():
        yield f"<h3>{escape(model)}</h3>{_parity(report, model, of)}"
    yield "<h2 id='losslessness'>Losslessness</h2>" + _losslessness(report)
    if report.distribution is not None:
        yield "<h2 id='sampling'>Sampling</h2>" + _sampling(report)
    yield "<h2 id='acceptance'>Acceptance and speed</h2>" + _acceptance(report) + _speed(report)


def _parity(report: Report, model: str, of: ModelParity) -> str:
    facts = [
        ("error over noise, all tokens", show(of.error_over_noise)),
        ("largest of a token", show(of.largest_token_over_noise)),
        ("sigma ratio, median", show(of.sigma_ratio)),
        *((f"largest top-{k} error, relative", show(value)) for k, value in of.worst_relative_error.items()),
        ("KL, mean (noise)", f"{show(of.kl_mean)} ({show(of.kl_noise_mean)})"),
        (
            "Bhattacharyya, smallest",
            f"{of.bhattacharyya_smallest:.9f}" if of.bhattacharyya_smallest is not None else "not a number",
        ),
        ("flipped tokens, near-ties, of transformers in the dtype", f"{of.flips}, {of.near_ties}, {of.flips_of_noise}"),
    ]
    if of.rounding is not None:
        r = of.rounding
        facts += [
            ("int8 weights against the dtype's: likeliest token the same (the dtype against one precision up)",
             f"{show(r.same_choice)} ({show(r.same_choice_of_noise)})"),
            ("int8 weights against the dtype's: error of logits (noise of the dtype)",
             f"{show(r.logit_error)} ({show(r.logit_noise)})"),
        ]  # fmt: skip
    first = of.first_divergence
    if first is not None:
        anchor = token_id(report, first.prompt, first.position)
        link = f"<a href='#{anchor}'>{escape(first.prompt)}, position {first.position}</a>"
        tie = "a near-tie" if first.near_tie else "not a near-tie"
        facts.append(
            (
                "first divergence",
                f"{link}: token {first.chosen} for {first.expected}, gap {show(first.gap_ulp)} ULP, {tie}",
            )
        )
    slices = sorted(
        of.slices, key=lambda s: s.error_over_noise if s.error_over_noise is not None else 1e300, reverse=True
    )
    worst = [
        (f"{s.kind} {escape(s.name)}", str(s.tokens), show(s.error_over_noise), show(s.largest_error), str(s.flips))
        for s in slices[:SHOWN_SLICES]
    ]
    return (
        table(("figure", "value"), facts, f"Parity of the {model}")
        + f"<p class='soft'>The {len(worst)} slices of {len(slices)} with the largest error:</p>"
        + table(("slice", "tokens", "error over noise", "largest error", "flips"), worst, f"Slices of the {model}")
    )


def _losslessness(report: Report) -> str:
    found = report.losslessness
    edges = table(
        ("graph, at the end of its bucket", "tokens equal to plain decode"),
        [(f"<code>{escape(e.graph)}</code>", str(e.tokens)) for e in found.edges],
        "Edges",
    )
    rows = [
        (
            escape(d.graph),
            f"{escape(d.prompt)}, {d.position}",
            str(d.plain),
            str(d.speculative),
            show(d.gap),
            "near-tie" if d.near_tie else "<span class='mark failed'>fault</span>",
        )
        for d in found.differences[:SHOWN_DIFFERENCES]
    ]
    text = (
        f"<p>{found.tokens:,} tokens compared; {len(found.differences)} differ, {found.near_ties} of them at near-ties "
        f"(gaps under {show(found.tie_tolerance)} of the largest logit).</p>"
    )
    heads = ("run", "where", "plain", "speculative", "gap", "")
    return text + (table(heads, rows, "Differences", numbers=2) if rows else "") + "<p></p>" + edges


def _sampling(report: Report) -> str:
    found = report.distribution
    assert found is not None
    rows = [
        (
            f"<code>{escape(t.graph)}</code>",
            escape(t.test),
            str(t.tokens),
            show(t.p_value),
            show(t.shift) if t.shift is not None else "",
        )
        for t in found.tests
    ]
    return (
        f"<p>Temperature {found.temperature}, top-k {found.top_k}, top-p {found.top_p}. A right artifact fails this "
        f"gate with probability {found.false_alarm_rate:g} at most. <em>Finds</em> is the probability that must move "
        "towards the draft's tokens for the test to see it, nine times of ten.</p>"
        + table(("graph", "test", "tokens", "p", "finds"), rows, "Exact tests of sampling", numbers=2)
    )


def _acceptance(report: Report) -> str:
    rows = []
    for a in report.acceptance:
        for kind, of in {"all prompts": None, **a.by_class}.items():
            tokens, reached = (
                (a.tokens_per_step, a.accepted_by_position)
                if of is None
                else (of.tokens_per_step, of.accepted_by_position)
            )
            rows.append((f"K={a.draft_tokens}", escape(kind), f"{tokens:.2f}", " ".join(f"{r:.2f}" for r in reached)))
    return table(("K", "class", "tokens a step", "accepted at each place"), rows, "Acceptance", numbers=2)


def _speed(report: Report) -> str:
    s = report.speed
    rows = [
        (
            name,
            f"{of.first_token_ms:.0f}",
            show(of.inter_token_ms),
            show(of.step_p50_ms),
            show(of.step_p99_ms),
            f"{of.tokens_per_s:.1f}",
            show(cost) if cost is not None else "no price",
        )
        for name, of, cost in (
            ("plain decode", s.plain, s.cost_per_million_tokens.plain),
            (f"speculation, K={s.draft_tokens}", s.speculative, s.cost_per_million_tokens.speculative),
        )
    ]
    return (
        f"<p>One request at a time, over {escape(', '.join(s.prompts))}: speed-up {show(s.measured_speedup)} measured, "
        f"{show(s.expected_speedup)} expected from acceptance and a draft pass that costs {show(s.draft_cost)} "
        "of a target pass.</p>"
        + table(
            ("", "first token, ms", "a token, ms", "step p50, ms", "step p99, ms", "tokens/s", "cost of 1M tokens"),
            rows,
            "Speed",
        )
    )


def token_id(report: Report, name: str, position: int) -> str:
    """The anchor of a token."""
    number = next((i for i, s in enumerate(report.sequences) if s.name == name), 0)
    return f"t-{number}-{position}"


def _prompts(report: Report) -> Iterator[str]:
    yield (
        "<h2 id='prompts'>Prompts and their tokens</h2><p class='soft'>Shaded: the answer. Marked: tokens after which "
        "the artifact would choose otherwise than the baseline.</p>"
    )
    flips: dict[tuple[int, int], int] = {}
    for of in report.parity.values():
        points = of.points
        for number, position, flip in zip(points.sequence, points.position, points.flip, strict=True):
            if flip:
                flips[number, position] = min(flip, flips.get((number, position), 2))
    for number, sequence in enumerate(report.sequences):
        yield _prompt(number, sequence, flips)


def _prompt(number: int, sequence: TokenSequence, flips: dict[tuple[int, int], int]) -> str:
    parts = []
    for position, text in enumerate(sequence.texts):
        styles = [
            *(["answer"] if position >= sequence.prompt_tokens else []),
            *({1: ["fault"], 2: ["flip"]}.get(flips.get((number, position), 0), [])),
        ]
        kind = f" class='{' '.join(styles)}'" if styles else ""
        parts.append(f"<b id=t-{number}-{position}{kind}>{escape(text)}</b>")
    about = f"{escape(sequence.kind)}, {len(sequence.tokens)} tokens"
    head = f"<strong>{escape(sequence.name)}</strong> <span class='soft'>{about}</span>"
    return f"<details id='s-{number}'><summary>{head}</summary><div class='tokens'>{''.join(parts)}</div></details>"


def _provenance(report: Report) -> str:
    p = report.provenance
    goldens = ", ".join(f"{model}: {c.computed} computed, {c.cached} from the cache" for model, c in p.goldens.items())
    rows = [
        ("recipe", f"<code>{escape(p.recipe_digest)}</code>"),
        ("lock", f"<code>{escape(p.lock_digest)}</code>"),
        ("toolchain", escape(", ".join(f"{k} {v}" for k, v in p.toolchain.items()))),
        ("needs", escape(", ".join(f"{k} {v}" for k, v in p.requires.items()))),
        ("ran on", escape(", ".join(f"{k} {v}" for k, v in p.ran_on.items()))),
        ("reference", f"transformers {escape(p.transformers)}; {escape(goldens)}"),
        ("time", escape(", ".join(f"{name} {seconds:.0f} s" for name, seconds in p.seconds.items()))),
    ]
    return (
        "<h2 id='provenance'>Provenance</h2>"
        + table(("", ""), rows, "Provenance", numbers=2)
        + "<p class='soft'>The same figures for machines: <code>parity.json</code> and <code>junit.xml</code>, "
        "beside this page.</p>"
    )
