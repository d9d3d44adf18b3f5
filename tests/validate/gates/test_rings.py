"""The gates on ring caches: they pass, over every key that was written, and notice rings that lose keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cache.local import Cache
from pipeline.graphs.spec import Ring
from pipeline.models.parallel import Attend
from pipeline.plan import plan as planning
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import GateRun, run_gates
from pipeline.validate.prompts import Prompt
from support import families
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

KV = 160


def gates_of(root: Path, *, kv: int = KV) -> GateRun:
    draft = families.write_pair(families.FAMILIES["gemma3"], root)
    recipe = Recipe.model_validate(
        {
            "name": "rings",
            "target": {"source": "./target", "dtype": "float32"},
            "draft": draft,
            "speculation": {"draft_tokens": (3,), "sampling": ("greedy", "stochastic", "shaped")},
            "shapes": {"batch": (2,), "prefill": (24,), "kv": (kv,)},
            "validate": {"max_new_tokens": 40},
        }
    )
    pair = resolve_pair(recipe, base=root, cache=root / "cache")
    prompts = [Prompt(f"p{i}", "chat", text * 4) for i, text in enumerate(families.PROMPTS[:3])]
    engine = make_engine(recipe, pair)
    assert engine.manifest.pair.rings
    return run_gates(GateInputs(engine, recipe, prompts, pair, Cache(root / "goldens", "goldens"), no_log))


def test_gates_pass(tmp_path):
    """Probes fill rows of 159 positions; the rings have 128 slots."""
    run = gates_of(tmp_path)
    assert run.passed, run.findings


def test_gates_notice_a_ring_that_is_too_short(tmp_path, monkeypatch):
    """Calls of 24 tokens write over keys that their first queries see."""
    monkeypatch.setattr(planning, "rings_of", lambda models, graphs: (Ring(6, 20),))
    run = gates_of(tmp_path)
    assert any("score-target" in finding for finding in run.findings["parity"]), run.findings


@pytest.mark.slow
def test_gates_notice_a_ring_that_is_too_short_for_the_steps_back(tmp_path, monkeypatch):
    """It holds what one call needs, but not the last windows to which the gates go back."""
    monkeypatch.setattr(planning, "rings_of", lambda models, graphs: (Ring(6, 6 - 1 + 24),))
    assert not gates_of(tmp_path).passed


@pytest.mark.slow
@pytest.mark.parametrize("more", [-1, 1])
def test_gates_notice_a_window_of_another_length_in_rings(tmp_path, monkeypatch, more):
    seen = Attend.seen

    def changed(attend: Attend, keys: int):
        return seen(replace(attend, window=attend.window + more) if attend.ring else attend, keys)

    monkeypatch.setattr(Attend, "seen", changed)
    assert not gates_of(tmp_path).passed
