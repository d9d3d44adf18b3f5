"""Builds of pairs with experts in bfloat16: from the command line, through all gates."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from support import families
from support.planted_experts import PAIRS

pytestmark = [pytest.mark.compile, pytest.mark.slow]

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


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral", "qwen3-moe"])
def test_a_build_in_bfloat16_passes_all_gates(family: str, tmp_path: Path) -> None:
    """Near-ties of routers, which the kernels decide otherwise than transformers, failed parity."""
    log, report = build(recipe_of(family, families.write_pair(PAIRS[family], tmp_path)), tmp_path)
    assert report["passed"]
    target = report["parity"]["target"]
    assert target["experts"]["near_ties"] > 0, "no near-tie: nothing is tested"
    assert f"{target['experts']['tokens']} of {target['tokens']}" in log
    assert target["error_over_noise"] < 1.5


def test_a_build_with_experts_of_4_bits_passes_all_gates(tmp_path: Path) -> None:
    """References round each expert as it is stored."""
    spec = families.FAMILIES["qwen3-moe"]
    wide = {"moe_intermediate_size": 64, "intermediate_size": 128}
    draft = families.write_pair(replace(spec, changes=spec.changes | wide), tmp_path)
    target = {"source": "./target", "dtype": "bfloat16", "weights": "int4"}
    _, report = build(recipe_of("qwen3-moe", draft, target=target), tmp_path)
    assert report["passed"]
    with safe_open(tmp_path / "out" / "weights" / "target" / "rank-0-of-1.safetensors", "pt") as shard:
        name = "model.layers.0.mlp.experts.down_proj.weight"
        assert shard.get_tensor(name).dtype == torch.uint8
        assert shard.get_slice(name).get_shape() == [6, 2, 2, 32, 18]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_build_with_whole_experts_on_two_ranks_passes_all_gates(weights: str | None, tmp_path: Path) -> None:
    """Each rank's shard has the half of the experts, and the tokens are those that the gates compare."""
    spec = families.FAMILIES["qwen3-moe"]
    draft = families.write_pair(replace(spec, changes=spec.changes | {"num_experts": 8}), tmp_path)
    target = {"source": "./target", "dtype": "float32" if weights is None else "bfloat16", "weights": weights}
    parallel = {"tensor": 2, "enable_expert_parallel": True}
    sections = {"target": target, "parallel": parallel, "speculation": {"draft_tokens": [2], "sampling": ["greedy"]}}
    _, report = build(recipe_of("qwen3-moe", draft, **sections), tmp_path)
    assert report["passed"]
    for rank in range(2):
        with safe_open(tmp_path / "out" / "weights" / "target" / f"rank-{rank}-of-2.safetensors", "pt") as shard:
            names = [name for name in list(shard.keys()) if ".experts." in name]
            shapes = {name: shard.get_slice(name).get_shape() for name in names}
        assert shapes
        assert {shape[0] for shape in shapes.values()} == {4}
