"""Plots of the parity report as inline SVG. Colours and type come from the page's style sheet. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 14, 44


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its label, whether it is logarithmic, and ticks if they are not to be chosen."""

    low: float
    high: float
    label: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None

    def share(self, value: float) -> float:
        """Return the position of a value, 0 to 1."""
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)

    def marks(self) -> list[tuple[float, str]]:
        """Return the values to mark, with their text."""
        if self.ticks is not None:
            return list(self.ticks)
        return _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high)


@dataclass(frozen=True)
class Link:
    """An anchor of the page, and its label."""

    anchor: str
    label: str


@dataclass
class Plot:
    """One plot, to which shapes are added."""

    title: str
    x: Axis
    y: Axis
    parts: list[str] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], style: str, key: str = "") -> None:
        """Add a line through points; `key` is its name in the legend."""
        if points:
            path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
            self.parts.append(f'<polyline class="line {style}" points="{path}"/>')
        self._key(style, key)

    def dots(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Add dots without names."""
        self.parts += [
            f'<circle class="dot {style}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="2.6"/>' for x, y in points
        ]

    def area(
        self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], style: str, key: str
    ) -> None:
        """Add a band between two lines."""
        points = [*low, *reversed(high)]
        if points:
            path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
            self.parts.append(f'<polygon class="band {style}" points="{path}"/>')
        self._key(style, key)

    def link(self, x: float, y: float, link: Link, style: str) -> None:
        """Add a dot that links to an anchor of the page."""
        label = escape(link.label)
        at = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
        self.parts.append(
            f'<a href="#{escape(link.anchor)}" aria-label="{label}"><title>{label}</title>'
            f'<circle class="hit" {at} r="9"/><circle class="dot {style}" {at} r="3.6"/></a>'
        )

    def bar(self, x: tuple[float, float], y: float, style: str, label: str = "", base: float | None = None) -> None:
        """Add a bar between two x values, from the floor or `base`."""
        left, right = self._x(x[0]), self._x(x[1])
        top, bottom = self._y(y), self._y(self.y.low if base is None else base)
        title = f"<title>{escape(label)}</title>" if label else ""
        self.parts.append(
            f'<rect class="bar {style}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" '
            f'height="{max(bottom - top, 0):.1f}">{title}</rect>'
        )

    def rule(self, y: float, label: str, style: str = "limit") -> None:
        """Add a horizontal line with a label: limits at the left, others at the right."""
        at = self._y(y)
        self.parts.append(f'<line class="{style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        x, anchor = (LEFT + 4, "start") if style == "limit" else (WIDTH - RIGHT, "end")
        self.parts.append(
            f'<text class="{style}" x="{x}" y="{at - 4:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
        )

    def key(self, style: str, text: str) -> None:
        """Add a legend entry without a shape."""
        self._key(style, text)

    def svg(self, name: str, caption: str) -> Markup:
        """Return the figure, with legend and caption, as markup in which all text is escaped."""
        body = "".join([*self._grid(), *self.parts])
        legend = "".join(f'<li><i class="{style}"></i>{escape(text)}</li>' for style, text in self.keys)
        return Markup(  # noqa: S704 - every text in it went through `escape`
            f'<figure id="{escape(name)}" class="plot"><h3>{escape(self.title)}</h3>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(self.title)}">{body}</svg>'
            + (f'<ul class="legend">{legend}</ul>' if legend else "")
            + f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def _key(self, style: str, text: str) -> None:
        if text and (style, text) not in self.keys:
            self.keys.append((style, text))

    def _x(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> list[str]:
        parts = []
        for value, text in self.y.marks():
            at = self._y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
        for value, text in self.x.marks():
            parts.append(
                f'<text x="{self._x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(self.x.label)}</text>"
        )
        parts.append(
            f'<text class="name" transform="rotate(-90 11 {middle})" x="11" y="{middle}" text-anchor="middle">'
            f"{escape(self.y.label)}</text>"
        )
        return parts


def axis(values: Sequence[float], label: str, *, log: bool = False, low: float | None = None) -> Axis:
    """Return an axis that holds all values, with a margin."""
    drawable = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    least, most = min(drawable), max(drawable)
    if log:
        return Axis(10 ** math.floor(math.log10(least)), 10 ** math.ceil(math.log10(most * 1.05)), label, log=True)
    bottom = least if low is None else low
    return Axis(bottom, bottom + (most - bottom) * 1.08 or bottom + 1.0, label)


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    first, last = round(math.log10(low)), round(math.log10(high))
    step = max(-(-(last - first) // 6), 1)
    return [(10.0**n, f"1e{n}" if abs(n) > 2 else f"{10.0**n:g}") for n in range(first, last + 1, step)]


def _round_steps(low: float, high: float) -> list[tuple[float, str]]:
    span = (high - low) or 1.0
    raw = span / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step)
    return [(n * step, f"{n * step:g}") for n in range(first, math.floor(high / step) + 1)]
