"""P-EAGLE heads: their files, proposals against a reference without caches, and the contracts of every draft."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.cache.local import Cache
from pipeline.errors import SourceError
from pipeline.models.eagle3 import describe, fitted, opened_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, weight_specs
from pipeline.plan.estimates import layer_passes
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.speculation.chains import Batch, guesses
from pipeline.validate.draft.examine import Effort, examine
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import RAGGED, emitted, make_engine
from support.heads import AMAZON, FLAT, P_EAGLE, SIZES, Parts, shapes, write_head
from support.parallel_drafts import PEagleDescription, drive, pair_of
from support.paths import ROOT
from support.reports import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = Parts(layer="layers.0.", layers=3, mask_hidden=True)
SPECFORGE = {**FLAT, "architectures": ["PEagleDraftModel"], "num_hidden_layers": 3}
TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 36}, "target")


def read(config, parts=PARTS, **readings):
    return fitted(TARGET, config_of(opened_config(config, shapes(parts), readings), "config.json"), "config.json")


@pytest.mark.parametrize(
    ("config", "writer", "mask", "told"),
    [
        (P_EAGLE, "speculators", 1, {}),
        (AMAZON, "amazon", 3, {}),
        (SPECFORGE, "specforge", 7, {"mask_token_id": 7}),
        (SPECFORGE | {"mask_token_id": 5}, "specforge", 5, {}),
        (P_EAGLE, "speculators", 9, {"mask_token_id": 9}),
    ],
)
def test_files_of_each_writer_are_read(config, writer, mask, told):
    found = read(config, **told)
    assert (found.eagle3.writer, found.eagle3.mask_token, found.layers) == (writer, mask, 3)
    assert found.draft_kind.method == "p_eagle"
    assert found.eagle3.taps == (2, 18, 33)
    assert {spec.name: spec.shape for spec in weight_specs(found)}["mask_hidden"] == (192,)
    assert f"of 3 layers, mask token {mask}, of {writer}" in describe(found)


def test_norm_before_residual_that_is_left_out_is_false():
    """In files of speculators it is true for EAGLE-3, and false for P-EAGLE."""
    config = {key: value for key, value in P_EAGLE.items() if key != "norm_before_residual"}
    assert not read(config).eagle3.norm_before_residual


@pytest.mark.parametrize(
    ("config", "parts", "what"),
    [
        (SPECFORGE, {}, "mask_token_id=null"),
        (P_EAGLE | {"mask_token_id": 512}, {}, "mask_token_id=512: expected a token, 0 to 511"),
        (P_EAGLE | {"ptd_token_id": 4}, {}, "ptd_token_id=4: mask_token_id=1 differs"),
        (P_EAGLE, {"mask_hidden": False}, "mask_hidden"),
        (P_EAGLE, {"taps": 0}, "fc.weight"),
        (FLAT | {"num_hidden_layers": 3}, {"mask_hidden": False}, "num_hidden_layers=3"),
    ],
)
def test_what_is_incomplete_is_refused_by_name(config, parts, what):
    with pytest.raises(SourceError, match=what):
        read(config, Parts(**({"layer": "layers.0.", "layers": 3, "mask_hidden": True} | parts)))


@pytest.mark.parametrize(("name", "told"), [("speculators", {}), ("specforge", {"mask_token_id": 7})])
def test_files_of_the_tools_themselves_are_read(name, told):
    """Configs and shapes that speculators 0.9 and SpecForge 0.2 wrote (`support/public_heads.py`)."""
    written = json.loads((ROOT / f"tests/public_heads/{name}-p-eagle.json").read_text())
    config = config_of(opened_config(written["config"], written["tensors"], told), name)
    assert (config.eagle3.writer, config.eagle3.mask_token, config.layers) == (name, 7, 3)
    assert config.eagle3.norm_before_residual == (name == "speculators")
    named = {tensor_name(key): tuple(shape) for key, shape in written["tensors"].items() if key != "t2d"}
    assert named.pop("mask_hidden") == (1, 1, 192)
    assert named == {spec.name: spec.shape for spec in weight_specs(config) if spec.name != "mask_hidden"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("p-eagle")
    write_head(root / "head", P_EAGLE | {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, PARTS)
    return root


def recipe_of(dtype="float32", steps=(1, 2, 4), kv=(64,), sampling=("greedy",), batch=(1, 4), lookup=None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "head",
            "target": {"source": "pico://llama", "dtype": dtype},
            "draft": {"source": "head"},
            "speculation": {"method": "p_eagle", "draft_tokens": steps, "sampling": sampling, "lookup": lookup},
            "shapes": {"batch": batch, "prefill": (16, 32), "kv": kv},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_speculation_equals_plain_decode(work, steps, rows):
    engine = make_engine(recipe_of(), pair_of(work, recipe_of()))
    assert emitted(engine, RAGGED[:rows], 50, draft_tokens=steps)
    assert engine.stats()["catch_ups"] == 0


def test_proposals_equal_the_description(work, monkeypatch):
    recipe = recipe_of(steps=(2, 4), batch=(1,), lookup=3)
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    drive(engine, PEagleDescription(engine, pair), monkeypatch)


def test_chains_of_the_doctor_and_of_training_equal_the_description(work):
    """From every position of a text at once, as `tandem draft doctor` measures and `tandem distill` learns."""
    recipe = recipe_of(steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    reference = PEagleDescription(make_engine(recipe, pair), pair)
    text = [5, 9, 3, 40, 2, 77, 5, 9, 11, 300, 8, 9]
    states = reference.states(text[:-1])[None]
    loaded = {**reference.w, EMBEDDING: reference.embedding}
    batch = Batch(torch.tensor([text]), states, states, torch.ones(1, len(text) - 1, dtype=torch.bool))
    ids = torch.arange(len(loaded[D2T])) + loaded[D2T]
    for depth, guess in enumerate(guesses(pair[1].config, loaded, batch, 3)):
        best = ids[guess.logits_MV.argmax(-1)].tolist()
        for token, began in zip(best, guess.began_M.tolist(), strict=True):
            assert token == reference.proposals(text[: began + 2], 3)[depth]


def test_the_doctor_measures_masks_and_tries_other_readings(work):
    recipe = recipe_of(steps=(2, 4), batch=(1,))
    effort = Effort(prompts=2, new_tokens=12, places=3)
    report = examine(recipe, pair_of(work, recipe), [[5, 9, 3], [7, 2, 4]], "float32", effort)
    assert report.read.startswith("P-EAGLE head of 3 layers, mask token 1")
    assert report.verdict == "chance"
    assert len(report.current.by_place) == 3
    tried = {other.reading.partition(":")[0] for other in report.others}
    assert tried == {"taps", "norm_before_residual", "vocabulary"}


@pytest.mark.parametrize(
    ("dtype", "kv", "sampling"),
    [
        ("float32", (64,), ("greedy",)),
        pytest.param("float32", (64,), ("greedy", "stochastic"), marks=pytest.mark.slow),
        pytest.param("bfloat16", (32, 64), ("greedy",), marks=pytest.mark.slow),
    ],
)
def test_gates_pass(work, dtype, kv, sampling):
    recipe = recipe_of(dtype, steps=(4,), kv=kv, sampling=sampling)
    pair = pair_of(work, recipe)
    chosen = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(PROMPTS[:1])]
    run = run_gates(
        GateInputs(make_engine(recipe, pair), recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert run.passed, run.findings
    assert len(run.parity.section.models["draft"].layers) == 3


def test_parity_sees_a_wrong_second_layer(work):
    recipe = recipe_of(steps=(2,), kv=(64,), batch=(1,))
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    engine.ranks.tensors["draft/model.layers.1.self_attn.k_proj.weight"] *= 1.03
    run = run_gates(
        GateInputs(engine, recipe, [Prompt("p0", "chat", PROMPTS[0])], pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert any(failure.startswith("draft:") for failure in run.findings["parity"])


def test_plan_counts_two_passes_of_the_draft(work):
    """One before and one after verification, whatever K is."""
    pair = pair_of(work, recipe_of())
    plan = make_plan(recipe_of(), pair[0].config, pair[1].config)
    passes = {layer_passes(plan.pair, graph) for graph in plan.graphs if graph.phase == "speculate"}
    assert passes == {3 + 2 * 3}
