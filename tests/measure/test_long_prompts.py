"""bench and tune run prompts that do not fit the caches with an answer, as the gates do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.measure import bench as module
from pipeline.measure.tune import tune
from pipeline.runtime.engine import Engine
from pipeline.sources.pair import resolve_pair
from pipeline.validate.prompts import load_prompts
from support.eager import make_engine
from support.reports import recipe_of

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = "The quick brown fox jumps over the lazy dog and " * 8
WARNING = "warning: 1 of 2 prompts do not fit a cache of 48 positions with 4 new tokens; only their last 44 tokens run"


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """An eager engine with 48 positions; `prompts.jsonl` has a longer prompt."""
    recipe = recipe_of("llama", 0, "float32")
    (tmp_path / "prompts.jsonl").write_text(
        f'{{"class": "chat", "prompt": "Hi"}}\n{{"class": "code", "prompt": "{LONG}"}}\n'
    )
    return make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))


def test_bench_cuts_long_prompts_as_the_gates_do(engine, tmp_path, monkeypatch):
    """It rejected prompts that the build had accepted."""
    (tmp_path / "recipe.yaml").write_text(
        "name: planted\ntarget: {source: 'pico://llama'}\ndraft: {derive: {from: target, layers: [0]}}\n"
        "speculation: {draft_tokens: [2]}\nshapes: {batch: [1], prefill: [32], kv: [48]}\n"
        "validate: {prompts: prompts.jsonl, max_new_tokens: 8}\n"
    )
    monkeypatch.setattr(module, "load", lambda *_, **__: engine)
    said: list[str] = []
    rows = module.bench(tmp_path, tmp_path, 2, 4, None, None, said.append)
    assert [row.name for row in rows] == ["plain decode", "speculation"]
    assert said[0].startswith(WARNING)


def test_tune_cuts_long_prompts(engine, tmp_path):
    said: list[str] = []
    tune(engine, load_prompts(tmp_path / "prompts.jsonl"), 1, 4, said.append)
    assert any(line.startswith(WARNING) for line in said)
