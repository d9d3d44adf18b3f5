"""A build refuses heads that are wrong or no use, and passes right ones, without a limit in the recipe.

Measured acceptance cannot show taps one layer off: its reference reads the same file. The doctor, which a build runs
before it compiles and whose verdict the gate holds, does. The shipped head itself: `benchmarks/faulty_heads.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.validate.draft.examine import Effort, examine
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.draft.short import is_refused
from pipeline.validate.gates.outcome import GateOutcome
from pipeline.validate.gates.run import run_gates
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import Prompt
from support.reports import PROMPTS, SMALL, gates_of, inputs_of
from support.trained_drafts import TAPS, write_trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    write_trained(root, "eagle3", PROMPTS)
    return root


def recipe_of(head: str, dtype: str = "float32") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "head",
            "target": {"source": "target", "dtype": dtype},
            "draft": {"source": head},
            "speculation": {"method": "eagle3", "draft_tokens": (3,)},
            "shapes": SMALL,
            "validate": {"max_new_tokens": 10},
        }
    )


def acceptance(work: Path, head: str, dtype: str = "float32") -> GateOutcome:
    run = gates_of(work, recipe_of(head, dtype), prompts=PROMPTS)
    assert not run.findings["parity"], "a wrong head is computed rightly"
    assert not run.findings["losslessness"]
    return run.acceptance


def examined(work: Path, head: str) -> DraftReport:
    recipe = recipe_of(head)
    pair = resolve_pair(recipe, base=work, cache=work / "sources")
    tokens = encoded_prompts([Prompt(text, "chat", text) for text in PROMPTS], tokenizer_files(pair[0]))
    return examine(recipe, pair, tokens, "float32", Effort(prompts=len(tokens), new_tokens=24, places=3))


def is_refused_before_compiling(work: Path, head: str) -> bool:
    return is_refused(examined(work, head), needs_acceptance=recipe_of(head).floor > 1)


def gate_with_doctor(work: Path, head: str) -> GateOutcome:
    """The gate as `tandem validate` runs it."""
    inputs = inputs_of(work, recipe_of(head), prompts=PROMPTS)
    return run_gates(replace(inputs, draft_report=examined(work, head))).acceptance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_head_passes(work, dtype):
    assert acceptance(work, "eagle3", dtype).findings == ()
    assert not is_refused_before_compiling(work, "eagle3")
    assert gate_with_doctor(work, "eagle3").findings == ()


def shuffled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    order = torch.randperm(len(weights["lm_head.weight"]), generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = weights["lm_head.weight"][order].contiguous()
    save_file(weights, folder / "model.safetensors")


def moved(by: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"eagle_aux_hidden_state_layer_ids": [tap + by for tap in TAPS], "eagle_config": None}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def test_a_shuffled_head_fails(work):
    shuffled(Path(shutil.copytree(work / "eagle3", work / "shuffled")))
    assert "below the floor 1.3" in acceptance(work, "shuffled").findings[0]
    assert is_refused_before_compiling(work, "shuffled")


@pytest.mark.parametrize("by", [1, -1])
def test_taps_one_layer_off_are_refused_before_a_build_compiles(work, by):
    """They cost half of the tokens per step, and both sides of the gate read them alike."""
    moved(by)(Path(shutil.copytree(work / "eagle3", work / f"moved{by}")))
    assert is_refused_before_compiling(work, f"moved{by}")
    assert "another reading" in gate_with_doctor(work, f"moved{by}").findings[0]


def test_a_half_trained_head_fails(work):
    write_trained(work, "eagle3", PROMPTS, steps=5, name="half")
    assert "below the floor 1.3" in acceptance(work, "half").findings[0]
