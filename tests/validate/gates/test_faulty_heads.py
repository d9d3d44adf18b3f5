"""The acceptance gate refuses heads that are no use, and passes right ones: with the floor of the shipped recipes.

The shipped head itself: `benchmarks/faulty_heads.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.recipe.schema import Recipe
from pipeline.validate.gates.outcome import GateOutcome
from support.reports import PROMPTS, SMALL, gates_of
from support.trained_drafts import TAPS, write_trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FLOOR = 1.3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    write_trained(root, "eagle3", PROMPTS)
    return root


def acceptance(work: Path, head: str, dtype: str = "float32") -> GateOutcome:
    recipe = Recipe.model_validate(
        {
            "name": "head",
            "target": {"source": "target", "dtype": dtype},
            "draft": {"source": head},
            "speculation": {"method": "eagle3", "draft_tokens": (3,)},
            "shapes": SMALL,
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": FLOOR}},
        }
    )
    run = gates_of(work, recipe, prompts=PROMPTS)
    assert not run.findings["parity"], "a wrong head is computed rightly"
    assert not run.findings["losslessness"]
    return run.acceptance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_head_passes(work, dtype):
    assert acceptance(work, "eagle3", dtype).findings == ()


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


FAULTS = {"shuffled": shuffled, "taps one layer higher": moved(1), "taps one layer lower": moved(-1)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_head_fails(work, fault):
    head = Path(shutil.copytree(work / "eagle3", work / fault))
    FAULTS[fault](head)
    assert "below the floor" in acceptance(work, fault).findings[0]


def test_a_half_trained_head_fails(work):
    write_trained(work, "eagle3", PROMPTS, steps=10, name="half")
    assert "below the floor" in acceptance(work, "half").findings[0]
