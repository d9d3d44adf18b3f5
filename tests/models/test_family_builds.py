"""Builds of a random pair of each family: from the command line, compiled for the CPU, through all gates."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import families
from support.builds import build, recipe_of

pytestmark = [pytest.mark.compile, pytest.mark.slow]

RECURRENT = ("qwen3-next", "qwen3.5", "qwen3.5-moe")
FLOAT32 = {"source": "./target", "dtype": "float32"}
BFLOAT16 = {"source": "./target", "dtype": "bfloat16"}
KINDS = {
    **{family: (family, FLOAT32) for family in families.FAMILIES},
    **{f"{family} in bfloat16": (family, BFLOAT16) for family in RECURRENT},
    **{f"{family} in int8": (family, BFLOAT16 | {"weights": "int8"}) for family in RECURRENT},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_passes_all_gates(kind: str, tmp_path: Path) -> None:
    """Logits, caches, greedy speculation as decode steps, sampling: of the artifact, against transformers."""
    family, target = KINDS[kind]
    draft = families.write_pair(families.FAMILIES[family], tmp_path)
    sampling = ["greedy", "stochastic"] if family in RECURRENT else ["greedy"]
    speculation = {"draft_tokens": [2], "sampling": sampling}
    _, report = build(recipe_of(family, draft, target=target, speculation=speculation), tmp_path)
    assert report["passed"]
    assert report["losslessness"]["tokens"] > 20
