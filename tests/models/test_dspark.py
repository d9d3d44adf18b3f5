"""DSpark drafts: their files, proposals against a reference without caches, and the contracts of every draft."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.cache.local import Cache
from pipeline.errors import RecipeError, SourceError
from pipeline.models.config import Markov
from pipeline.models.eagle3 import describe, fitted, opened_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, weight_specs
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.speculation.block_chains import guesses
from pipeline.speculation.chains import Batch
from pipeline.validate.draft.examine import Effort, examine
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import RAGGED, emitted, make_engine
from support.heads import SIZES
from support.parallel_drafts import (
    DFLASH,
    DSPARK,
    RANK,
    DFlashDescription,
    dflash_tensors,
    drive,
    dspark_config,
    pair_of,
    write_dflash,
)
from support.paths import ROOT
from support.reports import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 36}, "target")
TOP = DFLASH | {
    "architectures": ["Qwen3DSparkModel"], "dflash_config": None, "mask_token_id": 1, "target_layer_ids": [0, 2],
    "markov_rank": RANK, "markov_head_type": "gated", "enable_confidence_head": True,
}  # fmt: skip
"""As hf://deepseek-ai/dspark_qwen3_8b_block7: all fields at the top level."""

SPECULATORS = {
    "architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "draft_vocab_size": 128,
    "aux_hidden_state_layer_ids": [1, 3], "mask_token_id": 2, "block_size": 8, "sample_from_anchor": False,
    "markov_rank": RANK, "markov_head_type": "rnn", "enable_confidence_head": True,
    "transformer_layer_config": {"model_type": "qwen3", **SIZES, "num_hidden_layers": 2},
}  # fmt: skip
VANILLA, GATED, RNN = (Markov(kind, RANK) for kind in ("vanilla", "gated", "rnn"))


def read(config, told=None, **parts):
    shapes = {name: tuple(tensor.shape) for name, tensor in dflash_tensors(**parts).items()}
    return fitted(TARGET, config_of(opened_config(config, shapes, told or {}), "config.json"), "config.json")


def without(config, key):
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "parts", "told", "markov", "from_anchor"),
    [
        (DSPARK, {"markov": "vanilla"}, {}, VANILLA, True),
        (DSPARK | {"sample_from_anchor": False}, {"markov": "vanilla"}, {}, VANILLA, False),
        (DSPARK, {"markov": "vanilla"}, {"sample_from_anchor": False}, VANILLA, False),
        (dspark_config(shift_label=False), {"markov": "vanilla"}, {}, VANILLA, False),
        (dspark_config(markov_rank=None), {"markov": "vanilla"}, {}, VANILLA, True),
        (DFLASH | {"dflash_config": DSPARK["dflash_config"]}, {"markov": "vanilla"}, {}, VANILLA, True),
        (TOP, {"markov": "gated"}, {}, GATED, True),
        (SPECULATORS, {"markov": "rnn", "draft_vocab": 128}, {}, RNN, False),
        (SPECULATORS | {"sample_from_anchor": True}, {"markov": "rnn", "draft_vocab": 128}, {}, RNN, True),
    ],
)
def test_files_of_each_writer_are_read(config, parts, told, markov, from_anchor):
    found = read(config, told, **parts)
    head = found.eagle3
    assert (head.markov, head.from_anchor, head.taps) == (markov, from_anchor, (1, 3))
    assert found.draft_kind.method == "dspark"
    assert head.most_drafts == head.block - (not from_anchor)
    named = {spec.name: spec.shape for spec in weight_specs(found)}
    tensors = dflash_tensors(**parts)
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("markov_head.")}
    assert {name: shape for name, shape in named.items() if name.startswith("markov_head.")} == own
    assert f"{markov.kind} Markov head of rank {RANK}" in describe(found)
    assert "confidence head unused" in describe(found)


def test_a_draft_without_a_markov_head_is_a_dflash_draft():
    found = read(dspark_config(markov_rank=0))
    assert (found.draft_kind.method, found.eagle3.markov, found.eagle3.from_anchor) == ("dflash", None, True)


@pytest.mark.parametrize(("tool", "markov", "from_anchor"), [("speculators", RNN, True), ("specforge", GATED, True)])
def test_files_of_the_tools_themselves_are_read(tool, markov, from_anchor):
    """Configs and shapes that speculators 0.9 and SpecForge 0.2 wrote (`support/public_heads.py`)."""
    written = json.loads((ROOT / f"tests/public_heads/{tool}-dspark.json").read_text())
    target = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12}, "target")
    config = fitted(target, config_of(opened_config(written["config"], written["tensors"], {}), tool), tool)
    head = config.eagle3
    assert (head.writer, head.taps, head.markov, head.from_anchor) == (tool, (2, 6, 9), markov, from_anchor)
    named = {tensor_name(key): tuple(shape) for key, shape in written["tensors"].items() if key != "t2d"}
    kept = {name: shape for name, shape in named.items() if not name.startswith("confidence_head.")}
    shared = {EMBEDDING, HEAD} if config.shares_head else {EMBEDDING}
    assert kept == {spec.name: spec.shape for spec in weight_specs(config) if spec.name not in shared}


@pytest.mark.parametrize(
    ("config", "parts", "what"),
    [
        (without(SPECULATORS, "sample_from_anchor"), {"markov": "rnn", "draft_vocab": 128}, "sample_from_anchor"),
        (dspark_config(shift_label=False) | {"sample_from_anchor": True}, {"markov": "vanilla"}, "shift_label=false"),
        (DSPARK | {"sample_from_anchor": "yes"}, {"markov": "vanilla"}, "sample_from_anchor"),
        (dspark_config(markov_head_type="lstm"), {"markov": "vanilla"}, "supported: vanilla, gated, rnn"),
        (dspark_config(markov_rank=-1), {"markov": "vanilla"}, "markov_rank=-1"),
        (DSPARK | {"markov_rank": 8}, {"markov": "vanilla"}, "markov_rank=8: dflash_config.markov_rank=16 differs"),
        (DSPARK | {"architectures": ["Gemma4DSparkModel"]}, {"markov": "vanilla"}, "Qwen3.*Gemma4DSparkModel"),
        (DSPARK | {"dspark_noise_token_id": 3}, {"markov": "vanilla"}, "DSpark inside a target"),
        (DFLASH | {"architectures": ["DominoDraftModel"]}, {}, "Domino"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, parts, what):
    with pytest.raises(SourceError, match=what):
        read(config, **parts)


DRAFTS = {
    "vanilla": (DSPARK, {"markov": "vanilla"}),
    "gated": (TOP | {"sample_from_anchor": False}, {"markov": "gated"}),
    "rnn": (SPECULATORS | {"sample_from_anchor": True}, {"markov": "rnn", "draft_vocab": 128}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("dspark")
    for name, (config, parts) in DRAFTS.items():
        write_dflash(root / name, config, **parts)
    return root


def recipe_of(draft="vanilla", dtype="float32", steps=(1, 2, 4, 7), sampling=("greedy",), batch=(1, 4), lookup=None):
    return Recipe.model_validate(
        {
            "name": "spark",
            "target": {"source": "pico://llama", "dtype": dtype},
            "draft": {"source": draft},
            "speculation": {"method": "dspark", "draft_tokens": steps, "sampling": sampling, "lookup": lookup},
            "shapes": {"batch": batch, "prefill": (16, 32), "kv": (64,)},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


@pytest.mark.parametrize(("steps", "rows"), [(1, 4), (7, 1), (4, 4)])
def test_speculation_equals_plain_decode(work, steps, rows):
    engine = make_engine(recipe_of(), pair_of(work, recipe_of()))
    assert emitted(engine, RAGGED[:rows], 50, draft_tokens=steps)
    assert engine.stats()["catch_ups"] == 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_proposals_equal_the_description(work, draft, monkeypatch):
    """Each draft is chosen by the one before it, copied tokens among them."""
    recipe = recipe_of(draft, steps=(2, 5), batch=(1,), lookup=3)
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    drive(engine, DFlashDescription(engine, pair), monkeypatch)


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_markov_head_changes_proposals(work, draft):
    """The test above would pass without it otherwise."""
    recipe = recipe_of(draft, steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    described = DFlashDescription(make_engine(recipe, pair), pair)
    with_head = described.proposals([5, 9, 3, 40, 2], 5)
    described.w["markov_head.markov_w2.weight"] = torch.zeros_like(described.w["markov_head.markov_w2.weight"])
    assert with_head != described.proposals([5, 9, 3, 40, 2], 5)


@pytest.mark.parametrize("draft", DRAFTS)
def test_chains_of_the_doctor_equal_the_description(work, draft):
    """Answers follow the text's own tokens, so they are those of a step as far as its drafts are in the text."""
    recipe = recipe_of(draft, steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    described = DFlashDescription(make_engine(recipe, pair), pair)
    text = [5, 9, 3, 40, 2, 77, 5, 9]
    text += described.proposals(text, 3)
    states = described.states(text[:-1])[None]
    loaded = {HEAD: described.of_target.get(HEAD), **described.w, EMBEDDING: described.embedding}
    batch = Batch(torch.tensor([text]), states, states, torch.ones(1, len(text) - 1, dtype=torch.bool))
    ids = torch.arange(512) if D2T not in loaded else torch.arange(len(loaded[D2T])) + loaded[D2T]
    seen = 0
    for depth, guess in enumerate(guesses(pair[1].config, loaded, batch, 3)):
        best = ids[guess.logits_MV.argmax(-1)].tolist()
        for token, began in zip(best, guess.began_M.tolist(), strict=True):
            expected = described.proposals(text[: began + 2], 3)
            if expected[:depth] == text[began + 2 : began + 2 + depth]:
                assert token == expected[depth]
                seen += 1
    assert seen >= 11


def test_the_doctor_measures_and_tries_the_other_layout(work):
    recipe = recipe_of(steps=(2, 4), batch=(1,))
    report = examine(recipe, pair_of(work, recipe), [[5, 9, 3]], "float32", Effort(prompts=1, new_tokens=12, places=3))
    assert report.read.startswith("DSpark draft of 2 layers, mask token 1, blocks of 7")
    assert len(report.current.by_place) == 4
    assert "sample_from_anchor: false" in {other.reading for other in report.others}


@pytest.mark.parametrize(
    ("draft", "dtype", "sampling"),
    [
        ("gated", "float32", ("greedy",)),
        pytest.param("vanilla", "float32", ("greedy", "stochastic", "shaped"), marks=pytest.mark.slow),
        pytest.param("rnn", "bfloat16", ("greedy",), marks=pytest.mark.slow),
    ],
)
def test_gates_pass(work, draft, dtype, sampling):
    recipe = recipe_of(draft, dtype, steps=(4,), sampling=sampling)
    pair = pair_of(work, recipe)
    chosen = [Prompt("p0", "chat", PROMPTS[0])]
    run = run_gates(
        GateInputs(make_engine(recipe, pair), recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert run.passed, run.findings


@pytest.mark.parametrize("name", ["markov_head.markov_w1.weight", "markov_head.gate_proj.weight"])
def test_parity_sees_a_wrong_markov_head(work, name):
    recipe = recipe_of("gated", steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    engine.ranks.tensors[f"draft/{name}"] = engine.ranks.tensors[f"draft/{name}"] * 1.03
    chosen = [Prompt("p0", "chat", PROMPTS[0])]
    run = run_gates(GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log))
    assert any(failure.startswith("draft:") for failure in run.findings["parity"])


@pytest.mark.parametrize(("draft", "most"), [("vanilla", 7), ("gated", 7), ("rnn", 8)])
def test_a_step_proposes_as_many_tokens_as_the_layout_has(work, draft, most):
    pair = pair_of(work, recipe_of(draft))
    make_plan(recipe_of(draft, steps=(most,)), pair[0].config, pair[1].config)
    with pytest.raises(RecipeError, match="a block of this draft has") as caught:
        make_plan(recipe_of(draft, steps=(4, most + 1)), pair[0].config, pair[1].config)
    assert caught.value.fix == f"use at most {most}"


@pytest.mark.slow
def test_sampled_proposals_follow_the_noise_of_the_target(work):
    """Sampled answers are those of decode steps, with any K."""
    recipe = recipe_of("rnn", steps=(4,), sampling=("greedy", "stochastic"))
    engine = make_engine(recipe, pair_of(work, recipe))
    how = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.95, "seed": 5}
    plain = engine.generate([[5, 9, 3, 40]], speculate=False, **how)[0].tokens
    engine.ranks.reset()
    assert engine.generate([[5, 9, 3, 40]], draft_tokens=4, **how)[0].tokens == plain
