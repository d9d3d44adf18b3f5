"""The text of a proposed recipe: YAML with the reason of each value above it. Imports no torch."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from pipeline.proposal.choices import Chosen

WIDTH = 110
PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[a-z][a-z0-9_.-]*|(?:hf|s3)://[\w./@-]+")
"""Text that YAML reads as this text without quotes."""
ORDER = ("name", "target", "draft", "speculation", "shapes", "parallel", "backend", "validate")


def commented(chosen: Chosen, source: str) -> str:
    """Return the recipe file of these values."""
    sections = chosen.sections
    shown = "".join(letter if letter.isprintable() else "?" for letter in source)  # a line break would end the comment
    lines = [
        f"# Written by `tandem init {shown}`: a first recipe, from configs alone. Nothing was measured.",
        "# `tandem plan` shows what it takes, `tandem tune` measures K, `tandem draft doctor` the draft.",
    ]
    for name in sorted(sections, key=ORDER.index):
        lines += _section(chosen, name, sections[name])
    return "\n".join(lines) + "\n"


def _section(chosen: Chosen, name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield from _entry(chosen, name, name, value, "")
        return
    yield f"{name}:"
    for key, inner in value.items():
        yield from _entry(chosen, f"{name}.{key}", key, inner, "  ")


def _entry(chosen: Chosen, place: str, key: str, value: Any, indent: str) -> Iterator[str]:
    if reason := chosen.reasons.get(place):
        yield from textwrap.wrap(reason, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    yield f"{indent}{key}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style; text that YAML could read otherwise is quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
