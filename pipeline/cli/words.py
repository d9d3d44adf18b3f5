"""Sizes, times, counts and values as text for people. Pure; `--json` has all digits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")
SHORT = 12
"""Digits of a short digest, which is also the version of an artifact."""


def size(size_bytes: float) -> str:
    """Return a size with its unit: `10.8 MiB`."""
    unit = 0
    while abs(size_bytes) >= 1000 and unit < len(UNITS) - 1:
        size_bytes, unit = size_bytes / 1024, unit + 1
    return f"{size_bytes:.0f} B" if unit == 0 else f"{size_bytes:.1f} {UNITS[unit]}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 graph`, `7 graphs`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def moment(created: str) -> str:
    """Return a UTC time of a manifest or an alias without its seconds: `2026-11-28 20:56`."""
    return re.sub(r"T(\d\d:\d\d).*", r" \1", created)


def pointer(aliases: str, release: str) -> str:
    """Return where aliases point: `prod -> acme-spec@1.1`."""
    return f"{aliases} -> {release}"


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.2e}"


def value(found: Any) -> str:
    """Return any value of a manifest in plain words: no brackets, no quotes, no long digests."""
    match found:
        case None | "":
            return "none"
        case bool():
            return "yes" if found else "no"
        case float():
            return number(found)
        case str():
            return found.removeprefix("sha256:")[:SHORT] if DIGEST.fullmatch(found) else found
        case Mapping():
            return ", ".join(f"{key} {value(each)}" for key, each in found.items()) or "none"
        case Iterable():
            return ", ".join(map(value, found)) or "none"
    return str(found)
