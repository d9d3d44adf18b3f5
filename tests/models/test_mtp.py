"""MTP modules inside Qwen3-Next and Qwen3.5 as drafts: their files, proposals, gates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cache.local import Cache
from pipeline.errors import InputError, RecipeError, SourceError
from pipeline.models.eagle3 import describe
from pipeline.models.weights import weight_specs
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.values import read_weight
from pipeline.sources.weights import shared_weights, weights
from pipeline.speculation.chains import Batch, guesses
from pipeline.validate.draft.examine import Effort, examine
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support import families, mtp
from support.builds import build
from support.builds import recipe_of as build_recipe
from support.eager import RAGGED, emitted, make_engine
from support.parallel_drafts import drive, pair_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mtp")
    for family in mtp.MODULES:
        mtp.write_target(family, root / family)
    return root


def recipe_of(
    family: str = "qwen3.5", steps=(1, 3), batch=(1, 4), sampling=("greedy",), dtype="float32", **more: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "module",
            "target": {"source": f"{family}/target", "dtype": dtype},
            "draft": mtp.DRAFT,
            "speculation": {"method": "mtp", "draft_tokens": steps, "sampling": sampling, **more},
            "shapes": {"batch": batch, "prefill": (16, 32), "kv": (64,)},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


@pytest.mark.parametrize("family", mtp.MODULES)
def test_proposals_equal_transformers(work, family, monkeypatch):
    """Each draft by the one before it, copied tokens among them; after rejections and a decode step."""
    recipe = recipe_of(family, steps=(1, 3), batch=(1,), lookup=3)
    engine = make_engine(recipe, pair_of(work, recipe))
    drive(engine, mtp.Description(family, work / family), monkeypatch)


@pytest.mark.parametrize(("steps", "rows"), [(1, 4), (3, 4), (3, 1)])
def test_speculation_equals_plain_decode(work, steps, rows):
    engine = make_engine(recipe_of(), pair_of(work, recipe_of()))
    assert emitted(engine, RAGGED[:rows], 50, draft_tokens=steps)
    assert engine.stats()["catch_ups"] == 0


@pytest.mark.parametrize("family", mtp.MODULES)
def test_chains_of_the_doctor_equal_transformers(work, family):
    recipe = recipe_of(family)
    target, draft = pair_of(work, recipe)
    described = mtp.Description(family, work / family)
    text = [5, 9, 3, 40, 2, 77, 5, 9]
    refs = dict(weights(draft)) | shared_weights(draft, target)
    loaded = {spec.name: read_weight(refs, spec) for spec in weight_specs(draft.config)}
    with torch.no_grad():
        states = described.target.model(input_ids=torch.tensor([text])).last_hidden_state[:, :-1]
    batch = Batch(torch.tensor([text]), states, states, torch.ones(1, len(text) - 1, dtype=torch.bool))
    first = next(guesses(draft.config, loaded, batch, 1))
    torch.testing.assert_close(first.logits_MV, described.logits(text)[:-1], atol=2e-4, rtol=1e-4)


def test_the_doctor_measures_a_module(work):
    recipe = recipe_of()
    report = examine(recipe, pair_of(work, recipe), [[5, 9, 3]], "float32", Effort(prompts=1, new_tokens=12, places=2))
    assert report.read.startswith("MTP module of mtp: reads the target's output after its last norm")
    assert report.others == ()


@pytest.mark.parametrize(
    ("family", "dtype", "sampling"),
    [
        ("qwen3.5", "float32", ("greedy",)),
        pytest.param("qwen3.5", "float32", ("greedy", "stochastic", "shaped"), marks=pytest.mark.slow),
        ("qwen3-next", "float32", ("greedy",)),
        pytest.param("qwen3.5", "bfloat16", ("greedy", "stochastic", "shaped"), marks=pytest.mark.slow),
        pytest.param("qwen3.5-moe", "float32", ("greedy", "stochastic"), marks=pytest.mark.slow),
    ],
)
def test_gates_pass(work, family, dtype, sampling):
    recipe = recipe_of(family, dtype=dtype, sampling=sampling, steps=(2,))
    pair = pair_of(work, recipe)
    chosen = [Prompt("p0", "chat", families.PROMPTS[0]), Prompt("p1", "chat", families.PROMPTS[4])]
    run = run_gates(
        GateInputs(make_engine(recipe, pair), recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert run.passed, run.findings


@pytest.mark.parametrize(
    "name", ["fc.weight", "pre_fc_norm_hidden.weight", "model.layers.0.self_attn.q_gate_proj.weight"]
)
def test_parity_sees_a_wrong_module(work, name):
    recipe = recipe_of(steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    engine.ranks.tensors[f"draft/{name}"] = engine.ranks.tensors[f"draft/{name}"] * 1.05
    chosen = [Prompt("p0", "chat", families.PROMPTS[0])]
    run = run_gates(GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log))
    assert any(failure.startswith("draft:") for failure in run.findings["parity"])


def test_a_module_is_described_and_planned(work):
    target, draft = pair_of(work, recipe_of())
    assert draft.config.draft_kind.method == "mtp"
    assert (draft.config.layers, draft.config.shares_head, draft.config.eagle3.norm_output) == (1, True, True)
    assert describe(draft.config).startswith("MTP module")
    plan = make_plan(recipe_of(), target.config, draft.config)
    assert plan.pair.replayed == 6


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers=2 is not supported"),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers=3 is not supported"),
        (None, "the target's files have no MTP module: no tensor mtp.fc.weight"),
    ],
)
def test_other_targets_are_refused_by_name(tmp_path, change, what):
    target = mtp.write_target("qwen3.5", tmp_path / "qwen3.5", **(change or {}))
    if change is None:
        (target / "mtp.safetensors").unlink()
        index = json.loads((target / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != "mtp.safetensors"}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=what) as caught:
        pair_of(tmp_path, recipe_of())
    assert "draft.derive.mtp" in caught.value.where


def test_a_missing_tensor_of_the_module_is_named(tmp_path):
    target = mtp.write_target("qwen3.5", tmp_path / "qwen3.5")
    tensors = load_file(target / "mtp.safetensors")
    del tensors["mtp.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, target / "mtp.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"missing weight model\.layers\.0\.self_attn\.o_proj\.weight"):
        pair_of(tmp_path, recipe_of())


def test_a_target_of_another_family_has_no_module_that_is_read(tmp_path):
    families.write_pair(families.FAMILIES["llama"], tmp_path / "qwen3.5")
    with pytest.raises(SourceError, match="MTP modules of model_type 'llama' are not supported"):
        pair_of(tmp_path, recipe_of())


def test_a_recipe_says_what_it_derives():
    for derive, what in (({"layers": [0], "mtp": True}, "found both of layers and mtp"), ({}, "found neither")):
        with pytest.raises(ValueError, match=what):
            Recipe.model_validate(
                recipe_of().model_dump(by_alias=True) | {"draft": {"derive": {"from": "target", **derive}}}
            )


def test_the_method_of_a_module_is_mtp(work):
    recipe = recipe_of()
    other = recipe.model_copy(update={"speculation": recipe.speculation.model_copy(update={"method": "eagle3"})})
    target, draft = pair_of(work, recipe)
    with pytest.raises((RecipeError, InputError), match="found eagle3, but the draft is of method mtp"):
        make_plan(other, target.config, draft.config)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-next"])
def test_a_build_with_a_module_passes_all_gates(family, tensor, tmp_path):
    """Through the command line, compiled; the lock names the module."""
    mtp.write_target(family, tmp_path)
    speculation = {"method": "mtp", "draft_tokens": [2], "sampling": ["greedy"]}
    recipe = build_recipe(
        family, mtp.DRAFT, target={"source": "./target", "dtype": "float32"}, speculation=speculation,
        parallel={"tensor": tensor},
    )  # fmt: skip
    _, report = build(recipe, tmp_path)
    assert report["passed"]
