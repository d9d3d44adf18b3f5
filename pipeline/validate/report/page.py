"""The report as one page: verdict, what was tested, plots, tables, prompts, provenance. Opens offline. No torch.

Everything is in the file: style, script and drawings. Any dot in a plot leads to the prompt and token behind it. The
markup is in `templates/`, where all text is escaped; this module selects the content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.validate.report.figures import bucket_map, figures, token_anchor
from pipeline.validate.report.schema import ModelParity, Report, Slice, TokenSequence
from pipeline.validate.report.summaries import headlines, show

SECTIONS = {"parity": "parity", "losslessness": "losslessness", "distribution": "sampling", "acceptance": "acceptance"}
"""Where the page shows each gate."""

SHOWN_SLICES = 12
SHOWN_DIFFERENCES = 50
FLIP_STYLES = {0: "", 1: "fault", 2: "flip"}
"""Styles of tokens, by `Points.flip`."""

PASSED = "Passed: outputs match the reference model"
FAILED = "Failed: do not release this artifact"


@dataclass(frozen=True)
class ModelView:
    """One model's parity, its worst slices, and where its first divergence is on the page."""

    name: str
    parity: ModelParity
    worst_slices: list[Slice]
    divergence_anchor: str


@dataclass(frozen=True)
class TokenView:
    """A token of a prompt: its anchor, its style, its text."""

    anchor: str
    style: str
    text: str


@dataclass(frozen=True)
class PromptView:
    """A sequence and its tokens."""

    sequence: TokenSequence
    tokens: list[TokenView]


def render(report: Report) -> str:
    """Return the page, a complete HTML document."""
    return render_document(
        "page.html.j2",
        f"{report.name} {report.version}: parity report",
        {
            "report": report,
            "text": PASSED if report.passed else FAILED,
            "findings": ranked_findings(report),
            "sections": SECTIONS,
            "headlines": headlines(report),
            "scored_tokens": sum(of.tokens for of in report.parity.values()),
            "plots": list(figures(report)),
            "bucket_map": bucket_map(report),
            "models": [_model(report, name, of) for name, of in report.parity.items()],
            "shown_differences": SHOWN_DIFFERENCES,
            "prompts": list(_prompts(report)),
        },
    )


def plot_page(title: str, heading: str, plots: Sequence[Markup]) -> str:
    """Return a page of plots, a complete HTML document."""
    return render_document("plots.html.j2", title, {"heading": heading, "plots": plots})


def render_document(template: str, title: str, values: Mapping[str, object]) -> str:
    """Return a self-contained HTML document made from a template that extends `document.html.j2`."""
    folder = resources.files("pipeline.validate.report")
    style, script = (Markup((folder / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))  # noqa: S704 - ours
    page = _environment().get_template(template)
    return page.render(title=title, style=style, script=script, **values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.validate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    environment.filters["listed"] = lambda values: ", ".join(f"{name} {value}" for name, value in values.items())
    return environment


def ranked_findings(report: Report) -> list[str]:
    """Return the first finding of each gate, then the second, and so on."""
    ranked = sorted(
        (number, order, gate.name, finding)
        for order, gate in enumerate(report.gates)
        for number, finding in enumerate(gate.findings)
    )
    return [f"{name}: {finding}" for _, _, name, finding in ranked]


def _model(report: Report, name: str, of: ModelParity) -> ModelView:
    worst = sorted(of.slices, key=lambda s: 1e300 if s.error_over_noise is None else s.error_over_noise, reverse=True)
    first = of.first_divergence
    anchor = "" if first is None else token_id(report, first.prompt, first.position)
    return ModelView(name, of, worst[:SHOWN_SLICES], anchor)


def token_id(report: Report, name: str, position: int) -> str:
    """Return the anchor of a token."""
    number = next((i for i, sequence in enumerate(report.sequences) if sequence.name == name), 0)
    return token_anchor(number, position)


def _prompts(report: Report) -> Iterator[PromptView]:
    flips = _flips(report)
    for number, sequence in enumerate(report.sequences):
        tokens = [
            TokenView(token_anchor(number, at), _style(sequence, at, flips.get((number, at), 0)), text)
            for at, text in enumerate(sequence.texts)
        ]
        yield PromptView(sequence, tokens)


def _flips(report: Report) -> dict[tuple[int, int], int]:
    """Return flipped tokens by sequence and position: 1 where any graph flips beyond a near-tie, else 2."""
    flips: dict[tuple[int, int], int] = {}
    for of in report.parity.values():
        points = of.points
        for number, position, flip in zip(points.sequence, points.position, points.flip, strict=True):
            if flip:
                flips[number, position] = min(flip, flips.get((number, position), 2))
    return flips


def _style(sequence: TokenSequence, position: int, flip: int) -> str:
    answer = "answer" if position >= sequence.prompt_tokens else ""
    return f"{answer} {FLIP_STYLES[flip]}".strip()
