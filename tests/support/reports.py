"""Reports of eager engines, for tests of what is made from them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from pipeline.cache.local import Cache
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates import speed
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import GateRun, run_gates
from pipeline.validate.prompts import Prompt
from pipeline.validate.report.schema import Report
from pipeline.validate.run import make_report
from support.eager import EagerRanks, MakeRanks, make_engine

PROMPTS = ["The quick brown fox", "def add(first,", "What is the capital", "Once upon a time there", "In the morning"]


WIDE = {"batch": (1, 2), "prefill": (16, 32), "kv": (32, 48)}
SMALL = {"batch": (2,), "prefill": (16,), "kv": (32,)}
"""Shapes for faults that show in every graph."""


def recipe_of(family: str, seed: int, dtype: str, sampling=("greedy",), layers=(0,), shapes=WIDE, **validate) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "planted",
            "target": {"source": f"pico://{family}?seed={seed}", "dtype": dtype},
            "draft": {"derive": {"from": "target", "layers": layers}},
            "speculation": {"draft_tokens": (2,), "sampling": sampling},
            "shapes": shapes,
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}, **validate},
        }
    )


def gates_of(
    work: Path, recipe: Recipe, fault=None, seed: int = 0, prompts=PROMPTS, make_ranks: MakeRanks = EagerRanks
) -> GateRun:  # fmt: skip
    """Gates that have run on an eager engine, spoiled or not; speed, which has no limit, of one short answer."""
    with patch.multiple(speed, SPEED_PROMPTS=1, SPEED_TOKENS=2):
        return run_gates(inputs_of(work, recipe, fault, seed, prompts, make_ranks))


def inputs_of(
    work: Path, recipe: Recipe, fault=None, seed: int = 0, prompts=PROMPTS, make_ranks: MakeRanks = EagerRanks
) -> GateInputs:  # fmt: skip
    """The inputs of gates on an eager engine, spoiled or not."""
    pair = resolve_pair(recipe, base=work, cache=work / "sources")
    engine = make_engine(recipe, pair, make_ranks)
    if fault is not None:
        fault(engine.ranks, seed)
    chosen = [Prompt(f"p{i}", ("chat", "code")[i % 2], text) for i, text in enumerate(prompts)]
    return GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)


def report_of(work: Path, recipe: Recipe, fault=None, prompts=PROMPTS) -> Report:
    return make_report(gates_of(work, recipe, fault, prompts=prompts), {})
