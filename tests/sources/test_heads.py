"""EAGLE-3 heads in folders, as public tools write them, beside a tiny target: read right, through all gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cache.local import Cache
from pipeline.errors import RecipeError, SourceError
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.plan.lock import make_lock, pair_configs
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe, Target
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.heads import starter_recipe, verifier_note
from pipeline.sources.local import check_local
from pipeline.sources.pair import resolve, resolve_pair
from pipeline.sources.values import draft_token_ids, read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.checks import log_head
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import make_engine
from support.heads import ANGELSLIM, FLAT, MODELOPT, SAFEAILAB, SPECULATORS, Parts, write_head
from support.reports import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = "pico://llama?layers=4"
TAPPED = "eagle_aux_hidden_state_layer_ids"
INPUTS = {TAPPED: [0, 2, 4]}


def recipe_of(draft: Path | str, kv: int = 32, **readings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "head",
            "target": {"source": TARGET},
            "draft": {"source": str(draft), **readings},
            "speculation": {"method": "eagle3", "draft_tokens": (2,)},
            "shapes": {"batch": (1,), "prefill": (16,), "kv": (kv,)},
            "validate": {"max_new_tokens": 6, "gates": {"tokens_per_step": 1.0}},
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def pair_of(recipe: Recipe, cache: Path) -> tuple[Checkpoint, Checkpoint]:
    return resolve_pair(recipe, base=cache, cache=cache / "sources")


CASES = {
    "usual": (FLAT | INPUTS, Parts()),
    "speculators": (SPECULATORS | INPUTS, Parts(layer="layers.0.")),
    "five taps": (FLAT | {TAPPED: [0, 1, 2, 3, 4]}, Parts(taps=5)),
    "target's output": (MODELOPT, Parts(taps=0, hidden_norm=False)),
    "eagle 3.1": (SPECULATORS | INPUTS | {"norm_output": True}, Parts(options=("fc_norm",))),
    "norms and biases": (
        MODELOPT | INPUTS | {"attention_bias": True},
        Parts(options=("norm_before_fc", "qk_norm", "bias")),
    ),
    "whole vocabulary": (FLAT | INPUTS | {"draft_vocab_size": 512}, Parts(draft_vocab=None)),
    "target's lm_head": (FLAT | INPUTS | {"draft_vocab_size": 512}, Parts(draft_vocab=None, lm_head=False)),
    "safeailab": (SAFEAILAB | INPUTS, Parts()),
    "angelslim": (ANGELSLIM | {"aux_hidden_states_layer_ids": [0, 1, 3]}, Parts()),
}


GATED = ("five taps", "target's output", "eagle 3.1", "norms and biases", "target's lm_head")
"""The cases whose graphs differ."""


@pytest.mark.parametrize("name", GATED)
def test_gates_pass(name, tmp_path, cache):
    """Graphs of the head and a reference that is written apart from them compute the same."""
    config, parts = CASES[name]
    recipe = recipe_of(write_head(tmp_path / "head", config, parts))
    pair = pair_of(recipe, cache)
    engine = make_engine(recipe, pair)
    prompts = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(PROMPTS[:2])]
    run = run_gates(GateInputs(engine, recipe, prompts, pair, Cache(cache, "goldens"), no_log))
    assert run.passed, run.findings
    assert run.parity.section.models["draft"].layers


@pytest.mark.parametrize("name", CASES)
def test_a_lock_has_the_configs_of_the_sources(name, tmp_path, cache):
    """A plan from the lock is that of the files: the shapes of the tensors are in it."""
    config, parts = CASES[name]
    recipe = recipe_of(write_head(tmp_path / "head", config, parts), norm_before_residual=True)
    pair = pair_of(recipe, cache)
    lock = make_lock(recipe, *pair, {"backend": "inductor"}, {})
    assert pair_configs(recipe, lock, "lock") == tuple(checkpoint.config for checkpoint in pair)
    assert check_local(recipe, cache, cache / "sources").pair[1].config == pair[1].config


def test_t2d_alone_gives_the_tokens(tmp_path, cache):
    both = pair_of(recipe_of(write_head(tmp_path / "both", FLAT | INPUTS, Parts())), cache)[1]
    alone = pair_of(recipe_of(write_head(tmp_path / "alone", FLAT | INPUTS, Parts(), d2t=None)), cache)[1]
    assert torch.equal(draft_token_ids(alone), draft_token_ids(both))
    assert alone.config == both.config


def test_a_recipe_takes_t2d_where_d2t_is_wrong(tmp_path, cache):
    root = write_head(tmp_path / "head", FLAT | INPUTS, Parts(), d2t=torch.zeros(128, dtype=torch.int64))
    told = pair_of(recipe_of(root, vocabulary="t2d"), cache)[1]
    assert draft_token_ids(told)[-1] == 511
    assert read_tensor(weights(told)[D2T]).dtype == torch.int64


def test_t2d_that_marks_other_tokens_than_the_head_has_is_refused(tmp_path, cache):
    root = write_head(tmp_path / "head", FLAT | INPUTS, Parts(), d2t=None, t2d=torch.zeros(512, dtype=torch.bool))
    with pytest.raises(SourceError, match="t2d marks 0 tokens, but the head proposes from 128"):
        pair_of(recipe_of(root), cache)


@pytest.mark.parametrize("equal", [True, False])
def test_an_embedding_that_equals_the_targets_is_shared(tmp_path, cache, equal):
    target = resolve(TARGET, base=cache, cache=cache / "sources")
    embedding = load_file(target.root / "model.safetensors")[EMBEDDING] + (0 if equal else 1)
    root = write_head(tmp_path / "head", FLAT | INPUTS, Parts(), **{"embed_tokens.weight": embedding})
    assert pair_of(recipe_of(root), cache)[1].config.shares_embedding is equal


def test_a_head_follows_its_target_beyond_its_own_positions(tmp_path, cache):
    """Was: refused in the plan, as of a draft model."""
    root = write_head(tmp_path / "head", FLAT | INPUTS | {"max_position_embeddings": 16}, Parts())
    recipe = recipe_of(root, kv=64)
    plan = make_plan(recipe, *(checkpoint.config for checkpoint in pair_of(recipe, cache)))
    assert plan.pair.models.taps == (0, 2, 4)


def test_readings_for_a_draft_model_are_refused(cache):
    recipe = recipe_of("pico://llama?layers=4&draft_vocab=128", taps="inputs")
    with pytest.raises(SourceError, match=r"draft\.taps, but the draft is no head over the target's states"):
        pair_of(recipe, cache)


@pytest.mark.parametrize(
    ("config", "parts", "what"),
    [
        (FLAT | INPUTS | {"target_hidden_size": 32}, Parts(), "fc.weight reads 192 values"),
        (FLAT | INPUTS | {"vocab_size": 700}, Parts(), "vocab_size=700, but the target has 512"),
        (FLAT | {TAPPED: [1, 4, 9]}, Parts(), "the target has 4 layers"),
    ],
)
def test_a_head_of_another_target_is_refused(tmp_path, cache, config, parts, what):
    with pytest.raises((SourceError, RecipeError), match=what):
        pair_of(recipe_of(write_head(tmp_path / "head", config, parts)), cache)


def test_a_head_is_no_target(tmp_path, cache):
    root = write_head(tmp_path / "head", SAFEAILAB | {"draft_vocab_size": 512}, Parts(draft_vocab=None))
    with pytest.raises(SourceError):
        resolve(str(root), base=tmp_path, cache=cache / "sources")


def test_verifier_note_names_both_targets():
    assert verifier_note("hf://org/Target@main", SPECULATORS) is None
    assert verifier_note("./target", SPECULATORS) is None
    assert (
        verifier_note("hf://org/other@main", SPECULATORS)
        == "the head names the target org/target; the recipe has org/other"
    )


@pytest.mark.parametrize(
    "name", ["mtp.fc.weight", "model.mtp_layers.0.input_proj.weight", "model.layers.4.eh_proj.weight"]
)
def test_modules_of_a_target_that_predict_several_tokens_are_not_read(tmp_path, cache, name):
    target = resolve(TARGET, base=cache, cache=cache / "sources")
    for file in target.root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target.root / "model.safetensors") | {name: torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = (tmp_path / "config.json").read_text().replace("{", '{"num_nextn_predict_layers": 1,', 1)
    (tmp_path / "config.json").write_text(config)
    assert resolve(str(tmp_path), base=tmp_path, cache=cache / "sources").config == target.config


def test_a_shared_lm_head_is_the_targets(tmp_path, cache):
    config, parts = CASES["target's lm_head"]
    recipe = recipe_of(write_head(tmp_path / "head", config, parts))
    target, draft = pair_of(recipe, cache)
    engine = make_engine(recipe, (target, draft))
    assert HEAD not in weights(draft)
    assert torch.equal(engine.ranks.tensors[f"draft/{HEAD}"], engine.ranks.tensors[f"target/{EMBEDDING}"])


def test_starter_recipe_has_the_target_that_the_head_names(tmp_path, cache):
    root = write_head(tmp_path / "head", SPECULATORS | INPUTS, Parts(layer="layers.0."))
    data = starter_recipe(str(root), resolve(str(root), base=cache, cache=cache / "sources", role="draft"))
    recipe = Recipe.model_validate_json(json.dumps(data))
    assert (recipe.name, recipe.target.source, recipe.speculation.draft_tokens) == (
        "target-spec",
        "hf://org/target",
        (3,),
    )
    flat = resolve(str(write_head(tmp_path / "flat", FLAT, Parts())), base=cache, cache=cache / "sources", role="draft")
    with pytest.raises(SourceError, match="names no target"):
        starter_recipe("flat", flat)


def test_a_build_logs_the_reading_what_is_open_and_another_target(tmp_path, cache):
    config = SPECULATORS | {"eagle_config": {TAPPED: [0, 1, 3]}}
    recipe = recipe_of(write_head(tmp_path / "head", config, Parts(layer="layers.0.")))
    _, draft = pair_of(recipe, cache)
    lines: list[str] = []
    elsewhere = recipe.model_copy(update={"target": Target(source="hf://org/other")})
    log_head(elsewhere, draft, lines.append)
    assert lines[0].startswith("draft: EAGLE-3 head of speculators: reads the inputs of layers 1, 2, 4 (")
    assert lines[1:] == [
        f"draft: eagle_config.{TAPPED}=[0, 1, 3] may be outputs or inputs of layers: draft.taps",
        "draft: the head names the target org/target; the recipe has org/other",
    ]
