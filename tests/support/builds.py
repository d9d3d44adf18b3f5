"""Builds of small pairs from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from support import families

BUILD = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "build", "pair.yaml", "--out", "out"]


def recipe_of(family: str, draft: object, **sections: object) -> dict[str, object]:
    return {
        "name": family,
        "target": {"source": "./target", "dtype": "bfloat16"},
        "draft": draft,
        "speculation": {"draft_tokens": [2], "sampling": ["greedy", "stochastic"]},
        "shapes": {"batch": [2], "prefill": [16], "kv": [48]},
        "validate": {"prompts": "prompts.jsonl", "max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        **sections,
    }


def build(recipe: dict[str, object], root: Path) -> tuple[str, dict[str, Any]]:
    """Build through the command line; return the log and the report of parity."""
    (root / "pair.yaml").write_text(yaml.safe_dump(recipe))
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(families.PROMPTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = subprocess.run(BUILD, cwd=root, capture_output=True, text=True, encoding="utf-8", check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return built.stderr, json.loads((root / "out" / "reports" / "parity.json").read_text(encoding="utf-8"))
