"""Builds of a pair whose caches are rings: compiled for the CPU, from the command line, through all gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import families
from support.builds import build, recipe_of

pytestmark = [pytest.mark.compile, pytest.mark.slow]

SHAPES = {"batch": [2], "prefill": [24], "kv": [160]}
SPECULATION = {"draft_tokens": [2], "sampling": ["greedy"]}
WIDE = {"head_dim": 16, "intermediate_size": 128}
"""Sizes of which every matrix has whole groups of 4-bit values."""


def build_of_rings(tmp_path: Path, target: dict[str, Any], **sections: object) -> dict[str, Any]:
    """Build Gemma 3, whose layers have windows of 6 or none, and return its report."""
    spec = families.FAMILIES["gemma3"]
    draft = families.write_pair(replace(spec, changes=spec.changes | WIDE), tmp_path)
    recipe = recipe_of("gemma3", draft, target=target, speculation=SPECULATION, shapes=SHAPES, **sections)
    _, report = build(recipe, tmp_path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [ring["window"] for ring in manifest["pair"]["rings"]] == [6]
    return report


def test_a_build_of_4_bit_weights_passes_all_gates(tmp_path: Path) -> None:
    report = build_of_rings(tmp_path, {"source": "./target", "dtype": "bfloat16", "weights": "int4"})
    assert report["passed"]
    assert report["losslessness"]["tokens"] > 20


def test_a_build_on_two_ranks_passes_all_gates(tmp_path: Path) -> None:
    report = build_of_rings(tmp_path, {"source": "./target", "dtype": "float32"}, parallel={"tensor": 2})
    assert report["passed"]
    assert report["losslessness"]["tokens"] > 20
