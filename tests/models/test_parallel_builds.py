"""Builds of drafts that propose in one pass: compiled graphs pass all gates and emit what decode steps emit."""

from __future__ import annotations

import json

import pytest

from pipeline.build import BuildSettings, run
from pipeline.recipe import load
from pipeline.runtime.open import load as open_artifact
from support.parallel_drafts import write_parallel

pytestmark = [pytest.mark.compile, pytest.mark.slow]

RECIPE = """
name: parallel
target: {{source: "pico://llama", dtype: {dtype}}}
draft: {{source: draft}}
speculation: {{method: {method}, draft_tokens: [3], sampling: [greedy], lookup: 2}}
shapes: {{batch: [2], prefill: [16], kv: [48]}}
validate: {{prompts: prompts.jsonl, max_new_tokens: 10, gates: {{tokens_per_step: 1.0}}}}
"""


@pytest.mark.parametrize(("method", "dtype"), [("p_eagle", "float32"), ("dflash", "bfloat16"), ("dspark", "bfloat16")])
def test_a_build_passes_its_gates_and_speculates_losslessly(tmp_path, method, dtype):
    write_parallel(tmp_path / "draft", method)
    (tmp_path / "pair.yaml").write_text(RECIPE.format(method=method, dtype=dtype))
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["a", "bc", "d"])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings(load(tmp_path / "pair.yaml"), tmp_path, tmp_path / "out", tmp_path / "cache", workers=2)
    run(settings)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["pair"]["models"]["draft"]["eagle3"]["mask_token"] == 1
    with open_artifact(tmp_path / "out") as engine:
        prompts = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 8]]
        plain = engine.generate(prompts, max_new_tokens=30, speculate=False)
        speculative = engine.generate(prompts, max_new_tokens=30, draft_tokens=3)
    assert [a.tokens for a in speculative] == [a.tokens for a in plain]
