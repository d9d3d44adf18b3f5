"""DFlash drafts: their files, proposals against a reference without caches, and the contracts of every draft."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.cache.local import Cache
from pipeline.errors import RecipeError, SourceError
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.models.eagle3 import describe, fitted, opened_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, weight_specs
from pipeline.plan.estimates import layer_passes
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve
from pipeline.speculation.block_chains import guesses
from pipeline.speculation.chains import Batch
from pipeline.validate.draft.examine import Effort, examine
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import RAGGED, emitted, make_engine
from support.heads import SIZES
from support.parallel_drafts import DFLASH, DFlashDescription, dflash_tensors, drive, pair_of, write_dflash
from support.paths import ROOT
from support.reports import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 36}, "target")
OPTIONS = DFLASH["dflash_config"]
SPECULATORS = {
    "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "draft_vocab_size": 128,
    "aux_hidden_state_layer_ids": [1, 3], "mask_token_id": 2, "block_size": 8, "sample_from_anchor": False,
    "sliding_window_non_causal": False, "target_hidden_size": None,
    "transformer_layer_config": {"model_type": "qwen3", **SIZES, "num_hidden_layers": 2},
}  # fmt: skip
UNLISTED = SPECULATORS | {"aux_hidden_state_layer_ids": None}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "use_sliding_window": True}


def read(config, target=TARGET, told=None, **parts):
    shapes = {name: tuple(tensor.shape) for name, tensor in dflash_tensors(**parts).items()}
    return fitted(target, config_of(opened_config(config, shapes, told or {}), "config.json"), "config.json")


def nested(**changes):
    return SPECULATORS | {"transformer_layer_config": SPECULATORS["transformer_layer_config"] | changes}


@pytest.mark.parametrize(
    ("config", "parts", "writer", "taps", "mask"),
    [
        (DFLASH, {}, "specforge", (1, 3), 1),
        (DFLASH | {"dflash_config": {**OPTIONS, "target_layer_ids": [1, 33]}}, {}, "specforge", (2, 34), 1),
        (DFLASH | {"num_target_layers": 36, "dflash_config": {"mask_token_id": 1}}, {}, "specforge", (2, 34), 1),
        (SPECULATORS, {"draft_vocab": 128}, "speculators", (1, 3), 2),
        (
            SPECULATORS | {"aux_hidden_state_layer_ids": None},
            {"taps": 3, "draft_vocab": 128},
            "speculators",
            (2, 18, 33),
            2,
        ),
    ],
)
def test_files_of_each_writer_are_read(config, parts, writer, taps, mask):
    found = read(config, **parts)
    head = found.eagle3
    assert (head.writer, head.taps, head.mask_token, head.block) == (writer, taps, mask, 8)
    assert (found.draft_kind.method, found.layers, found.qk_norm) == ("dflash", 2, "head")
    assert found.shares_head == (parts.get("draft_vocab") is None)
    named = {spec.name: spec.shape for spec in weight_specs(found)}
    assert named["hidden_norm.weight"] == (64,)
    assert named["model.layers.0.self_attn.q_proj.weight"] == (128, 64)
    assert "blocks of 8" in describe(found)


@pytest.mark.parametrize(
    ("config", "causal", "has_window"),
    [
        (DFLASH, (), False),
        (DFLASH | {"is_causal": True}, (0, 1), False),
        (DFLASH | {"dflash_config": {**OPTIONS, "causal": True}}, (0, 1), False),
        (DFLASH | WINDOWS, (0,), True),
        (DFLASH | WINDOWS | {"is_causal": False}, (), True),
        (nested(**WINDOWS), (0,), True),
        (nested(**WINDOWS) | {"sliding_window_non_causal": True}, (), True),
    ],
)
def test_layers_with_a_window_are_causal_unless_the_file_says_otherwise(config, causal, has_window):
    found = read(config, draft_vocab=128 if "speculators_model_type" in config else None)
    assert found.eagle3.causal_layers == causal
    assert [limit.length for limit in found.limits] == ([64] if has_window else [])


@pytest.mark.parametrize(
    ("config", "parts", "what"),
    [
        (DFLASH | {"block_size": None}, {}, "block_size=null"),
        (DFLASH | {"dflash_config": {"target_layer_ids": [0, 2]}}, {}, "mask_token_id"),
        (DFLASH | {"mask_token_id": 5}, {}, r"mask_token_id=\[5, 1\]"),
        (DFLASH | {"dflash_config": {**OPTIONS, "target_layer_ids": [2, 0]}}, {}, "ascending"),
        (DFLASH | {"dflash_config": {**OPTIONS, "target_layer_ids": [0, 1, 2]}}, {}, "3 layers are read"),
        (DFLASH | {"dflash_config": {**OPTIONS, "projector_type": "domino"}}, {}, "projector_type"),
        (DFLASH | {"dflash_config": {**OPTIONS, "shift_label": True}}, {}, "shift_label"),
        (DFLASH | {"dflash_config": {**OPTIONS, "conv_kernel": 4}}, {}, "conv_kernel"),
        (DFLASH | {"dflash_config": {**OPTIONS, "attention_value_scale": 0.5}}, {}, "attention_value_scale"),
        (DFLASH | {"sample_from_anchor": 1}, {}, "sample_from_anchor=1"),
        (DFLASH | {"dflash_config": {**OPTIONS, "markov_rank": 16}}, {}, "markov_rank"),
        (DFLASH | {"architectures": ["DFlash2DraftModel"]}, {}, "DFlash2"),
        (
            {k: v for k, v in nested(**WINDOWS).items() if k != "sliding_window_non_causal"},
            {"draft_vocab": 128},
            "non_causal",
        ),
        (DFLASH | {"dflash_config": {"mask_token_id": 1}, "num_target_layers": None}, {}, "num_target_layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, parts, what):
    with pytest.raises(SourceError, match=what):
        read(config, **parts)


@pytest.mark.parametrize(("name", "causal"), [("speculators", (0,)), ("specforge", ())])
def test_files_of_the_tools_themselves_are_read(name, causal):
    """Configs and shapes that speculators 0.9 and SpecForge 0.2 wrote (`support/public_heads.py`)."""
    written = json.loads((ROOT / f"tests/public_heads/{name}-dflash.json").read_text())
    target = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12}, "target")
    config = fitted(target, config_of(opened_config(written["config"], written["tensors"], {}), name), name)
    head = config.eagle3
    assert (head.writer, head.taps, head.mask_token, head.block, head.causal_layers) == (name, (2, 6, 9), 7, 4, causal)
    named = {tensor_name(key): tuple(shape) for key, shape in written["tensors"].items() if key != "t2d"}
    shared = {EMBEDDING, HEAD} if config.shares_head else {EMBEDDING}
    assert named == {spec.name: spec.shape for spec in weight_specs(config) if spec.name not in shared}


def test_code_beside_a_draft_is_not_run_and_no_error(tmp_path):
    """The authors' files name a class of theirs for transformers, which never reads a draft here."""
    root = write_dflash(tmp_path / "draft", DFLASH | {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}})
    (root / "dflash.py").write_text("raise SystemExit")
    assert resolve(str(root), base=tmp_path, cache=tmp_path / "cache", role="draft").config.eagle3.block == 8


def test_a_mask_embedding_beside_a_draft_is_refused(tmp_path):
    root = write_dflash(tmp_path / "draft")
    (root / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=r"mask_embedding\.pt"):
        resolve(str(root), base=tmp_path, cache=tmp_path / "cache", role="draft")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("dflash")
    write_dflash(root / "whole")
    write_dflash(root / "anchor", DFLASH | {"sample_from_anchor": True})
    write_dflash(root / "causal", nested(**WINDOWS | {"sliding_window": 128}), draft_vocab=128)
    return root


def recipe_of(
    draft="whole", dtype="float32", steps=(1, 2, 4, 7), kv=(64,), sampling=("greedy",), batch=(1, 4), lookup=None
):
    return Recipe.model_validate(
        {
            "name": "block",
            "target": {"source": "pico://llama", "dtype": dtype},
            "draft": {"source": draft},
            "speculation": {"method": "dflash", "draft_tokens": steps, "sampling": sampling, "lookup": lookup},
            "shapes": {"batch": batch, "prefill": (16, 32), "kv": kv},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_speculation_equals_plain_decode(work, steps, rows):
    engine = make_engine(recipe_of(), pair_of(work, recipe_of()))
    assert emitted(engine, RAGGED[:rows], 50, draft_tokens=steps)
    assert engine.stats()["catch_ups"] == 0


@pytest.mark.parametrize("draft", ["whole", "causal", "anchor"])
def test_proposals_equal_the_description(work, draft, monkeypatch):
    recipe = recipe_of(draft, steps=(2, 5), batch=(1,), lookup=3)
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    drive(engine, DFlashDescription(engine, pair), monkeypatch)


@pytest.mark.parametrize("draft", ["whole", "causal"])
def test_chains_of_the_doctor_equal_the_description(work, draft):
    recipe = recipe_of(draft, steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    described = DFlashDescription(make_engine(recipe, pair), pair)
    text = [5, 9, 3, 40, 2, 77, 5, 9, 11, 300, 8, 9]
    states = described.states(text[:-1])[None]
    loaded = {**described.w, EMBEDDING: described.embedding}
    batch = Batch(torch.tensor([text]), states, states, torch.ones(1, len(text) - 1, dtype=torch.bool))
    ids = torch.arange(512) if D2T not in loaded else torch.arange(len(loaded[D2T])) + loaded[D2T]
    seen = 0
    for depth, guess in enumerate(guesses(pair[1].config, loaded, batch, 3)):
        best = ids[guess.logits_MV.argmax(-1)].tolist()
        for token, began in zip(best, guess.began_M.tolist(), strict=True):
            assert token == described.proposals(text[: began + 2], 3)[depth]
            seen += 1
    assert seen == 10 + 9 + 8


def test_the_doctor_measures_masks_and_tries_other_readings(work):
    recipe = recipe_of(steps=(2, 4), batch=(1,))
    effort = Effort(prompts=2, new_tokens=12, places=3)
    report = examine(recipe, pair_of(work, recipe), [[5, 9, 3], [7, 2, 4]], "float32", effort)
    assert report.read.startswith("DFlash draft of 2 layers, mask token 1, blocks of 8")
    assert report.verdict == "chance"
    assert len(report.current.by_place) == 4
    tried = {other.reading.partition(":")[0] for other in report.others}
    assert tried == {"taps", "sample_from_anchor"}


@pytest.mark.parametrize(
    ("draft", "dtype", "kv", "sampling"),
    [
        ("causal", "float32", (64,), ("greedy",)),
        pytest.param("whole", "float32", (64,), ("greedy", "stochastic"), marks=pytest.mark.slow),
        pytest.param("whole", "bfloat16", (32, 64), ("greedy",), marks=pytest.mark.slow),
    ],
)
def test_gates_pass(work, draft, dtype, kv, sampling):
    """Parity of the context's keys and values and of blocks of two positions; losslessness; exact sampling."""
    recipe = recipe_of(draft, dtype, steps=(4,), kv=kv, sampling=sampling)
    pair = pair_of(work, recipe)
    chosen = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(PROMPTS[:1])]
    run = run_gates(
        GateInputs(make_engine(recipe, pair), recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log)
    )
    assert run.passed, run.findings
    assert len(run.parity.section.models["draft"].layers) == 2


@pytest.mark.parametrize(
    "name", ["hidden_norm.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_parity_sees_a_wrong_draft(work, name):
    recipe = recipe_of("whole", steps=(2,), batch=(1,))
    pair = pair_of(work, recipe)
    engine = make_engine(recipe, pair)
    engine.ranks.tensors[f"draft/{name}"] = engine.ranks.tensors[f"draft/{name}"] * 1.03
    chosen = [Prompt("p0", "chat", PROMPTS[0])]
    run = run_gates(GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log))
    assert any(failure.startswith("draft:") for failure in run.findings["parity"])


def test_plan_has_one_pass_of_the_draft_and_refuses_more_tokens_than_a_block(work):
    pair = pair_of(work, recipe_of())
    plan = make_plan(recipe_of(), pair[0].config, pair[1].config)
    assert {layer_passes(plan.pair, graph) for graph in plan.graphs if graph.phase == "speculate"} == {3 + 2}
    states = {one.name for graph in plan.graphs for one in signature(graph, plan.pair, PlainPacking()).state}
    assert {name for name in states if name.startswith("draft/")} == {f"draft/{p}.{i}" for p in "kv" for i in range(2)}
    with pytest.raises(RecipeError, match="a block of this draft has 8 positions"):
        make_plan(recipe_of(steps=(4, 8)), pair[0].config, pair[1].config)


GPT_OSS = {
    "architectures": ["DFlashDraftModel"], "model_type": "gpt_oss", "attention_bias": True, "block_size": 8,
    "dflash_config": {"mask_token_id": 200000, "target_layer_ids": [1, 6, 11, 16, 21]}, "head_dim": 64,
    "hidden_size": 2880, "intermediate_size": 7680, "max_position_embeddings": 131072, "num_attention_heads": 64,
    "num_hidden_layers": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150000, "vocab_size": 201088,
}  # fmt: skip
"""Fields of hf://z-lab/gpt-oss-20b-DFlash, as public repositories quote them."""


def test_draft_of_gpt_oss_has_the_parameters_of_its_file():
    """784,767,104 by the published file: norms of heads and a bias of the output are in its tensors, in no field."""
    layer = {"self_attn.q_proj.bias": (4096,), "self_attn.o_proj.bias": (2880,)}
    layer |= {f"self_attn.{name}_norm.weight": (64,) for name in "qk"}
    shapes = {f"layers.{i}.{name}": shape for i in range(8) for name, shape in layer.items()}
    shapes |= {"fc.weight": (2880, 5 * 2880), "hidden_norm.weight": (2880,)}
    config = config_of(opened_config(GPT_OSS, shapes, {}), "config.json")
    assert (config.family, config.qk_norm, config.out_bias, config.expert_layers) == ("dflash", "head", True, ())
    own = [spec for spec in weight_specs(config) if spec.name not in (EMBEDDING, HEAD)]
    assert sum(math.prod(spec.shape) for spec in own) == 784_767_104
