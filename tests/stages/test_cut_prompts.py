"""What a build says before it compiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.checks import warn_of_cut_prompts
from pipeline.stages.settings import BuildSettings

RECIPE = """
name: cut
target: {source: "pico://llama?layers=2"}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [32], kv: [48]}
validate: {prompts: prompts.jsonl, max_new_tokens: 8}
"""


@pytest.mark.parametrize(("text", "warnings"), [("The quick", 0), ("The quick brown fox jumps " * 10, 1)])
def test_warn_of_cut_prompts(tmp_path: Path, text: str, warnings: int):
    (tmp_path / "cut.yaml").write_text(RECIPE)
    prompts = [{"id": "a", "class": "chat", "prompt": "Hi"}, {"id": "b", "class": "chat", "prompt": text}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    recipe, said = load(tmp_path / "cut.yaml"), []
    target, _ = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    settings = BuildSettings(recipe=recipe, base=tmp_path, out=tmp_path / "out", log=said.append)
    warn_of_cut_prompts(settings, tokenizer_files(target))
    assert len(said) == warnings
    assert all(
        line.startswith("warning: 1 of 2 prompts do not fit a cache of 48 positions with 8 new tokens") for line in said
    )
