"""Horizontal bars as a picture for a Markdown page: one group of bars a name, a bar a series. Plain SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

COLOURS = ("#2f6690", "#f4a259", "#8cb369")
NAMES, BARS, VALUES = 230, 420, 70
"""Widths of the three columns, in pixels."""

BAR, GAP, TOP = 11, 12, 52


def bars(title: str, values: Mapping[str, Mapping[str, float]], digits: int = 1) -> str:
    """The picture of `values` by name and series; every name has the same series."""
    series = list(next(iter(values.values())))
    most = max(value for of in values.values() for value in of.values())
    width, step = NAMES + BARS + VALUES, len(series) * BAR + GAP
    parts = [f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    for number, (label, colour) in enumerate(zip(series, COLOURS, strict=False)):
        parts.append(f'<rect x="{NAMES + 110 * number}" y="30" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{NAMES + 110 * number + 15}" y="39">{escape(label)}</text>')
    for place, (name, of) in enumerate(values.items()):
        top = TOP + place * step
        middle = top + len(series) * BAR / 2 + 4
        parts.append(f'<text x="{NAMES - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        for number, (value, colour) in enumerate(zip(of.values(), COLOURS, strict=False)):
            long, at = value / most * BARS, top + number * BAR
            parts.append(f'<rect x="{NAMES}" y="{at}" width="{long:.1f}" height="{BAR - 1}" fill="{colour}"/>')
            parts.append(f'<text x="{NAMES + long + 5:.1f}" y="{at + 9}">{value:.{digits}f}</text>')
    box = f'viewBox="0 0 {width} {TOP + len(values) * step}" width="{width}"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="11">'
    return f"{start}{paper}{''.join(parts)}</svg>\n"
