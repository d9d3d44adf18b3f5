"""int8 weights: what is stored, what references round to, what a recipe may say, and a whole build."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import RecipeError
from pipeline.graphs.packing import SCALE_BYTES, BlockPacking, PlainPacking
from pipeline.models.int8 import LARGEST, quantise, rounded
from pipeline.models.weights import EMBEDDING, OFFSET
from pipeline.recipe import load
from pipeline.sources.derived import derive
from pipeline.stages.shard_files import write_shards
from pipeline.validate.reference.layers import Reference
from support.checkpoints import write_checkpoint
from support.paths import ROOT
from support.shards import expected_slice, opened, pair_of

RECIPE = """
name: narrow
target: {source: "pico://llama?layers=2", dtype: bfloat16, weights: int8}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [32], kv: [96]}
validate: {prompts: pico.jsonl, max_new_tokens: 12}
"""


def test_quantise_rounds_each_row_by_its_own_scale_and_keeps_zeros() -> None:
    weight = torch.tensor([[1.27, -0.635, 0.004], [0.0, 0.0, 0.0], [2.54, 0.03, -2.54]])
    whole, scale = quantise(weight)
    assert whole.tolist() == [[127, -64, 0], [0, 0, 0], [127, 2, -127]]
    assert torch.allclose(scale, torch.tensor([0.01, 0.0, 0.02]))
    assert (rounded(weight) - weight).abs().max() <= 0.01 + 1e-6
    assert LARGEST == 127


@pytest.mark.parametrize("tp", [1, 2])
def test_shards_hold_int8_blocks_with_the_scales_of_whole_rows(tmp_path: Path, tp: int) -> None:
    whole = write_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    target = opened(tmp_path / "m", tmp_path)
    pair = replace(pair_of(target, target, tp=tp, dtype="bfloat16", replicated=False), target_weights="int8")
    shards = list(write_shards(pair, target, target, tmp_path / "out", packing=BlockPacking()))
    plain = next(s for s in shards if s.model == "draft")
    narrow = next(s for s in shards if s.model == "target")
    assert narrow.size < 0.65 * plain.size
    for shard in (s for s in shards if s.model == "target"):
        for name, stored in load_file(shard.path).items():
            if name == OFFSET:
                continue
            if whole[name].dim() == 1:
                assert stored.dtype == torch.bfloat16
                continue
            assert stored.dtype == torch.int8
            flat = stored.reshape(len(stored), -1)
            scales = flat[:, -SCALE_BYTES:].contiguous().view(torch.float32)
            pairs = flat[:, :-SCALE_BYTES].reshape(len(stored), -1, 32, 2).transpose(1, 2)
            found = pairs.reshape(len(stored) * 32, -1).float() * scales.reshape(-1, 1)
            want = expected_slice(name, rounded(whole[name]), shard.rank, tp, kv_heads=2, head_dim=16)
            assert torch.equal(found[: want.shape[0]], want), name
            assert not found[want.shape[0] :].any()


@pytest.mark.parametrize("packing", [BlockPacking(), PlainPacking()])
def test_an_int8_draft_leaves_its_targets_embedding_alone(tmp_path: Path, packing: BlockPacking) -> None:
    """Also where it has a copy of its own, since the target's is split over ranks."""
    whole = write_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (1,))
    pair = replace(pair_of(target, draft, tp=2, dtype="bfloat16"), draft_weights="int8")
    shards = list(write_shards(pair, target, draft, tmp_path / "out", packing=packing))
    of_target, of_draft = (load_file(shard.path) for shard in (shards[0], shards[-1]))
    assert of_draft[EMBEDDING].dtype == of_target[EMBEDDING].dtype == torch.bfloat16
    assert of_draft[EMBEDDING].numel() >= whole[EMBEDDING].numel()
    for name, stored in of_draft.items():
        if name.endswith("_proj.weight"):
            assert stored.dtype == torch.int8, name
            assert of_target[name].dtype == torch.bfloat16


@pytest.mark.parametrize("embedding", ["int8", None])
def test_reference_of_an_int8_draft_reads_the_targets_embedding_as_the_target_has_it(
    tmp_path: Path, embedding: str | None
) -> None:
    whole = write_checkpoint(tmp_path / "m", dtype=torch.float32)
    target = opened(tmp_path / "m", tmp_path)
    again = {name: rounded(w) if w.dim() == 2 and (embedding or name != EMBEDDING) else w for name, w in whole.items()}
    write_checkpoint(tmp_path / "r", again)
    same = opened(tmp_path / "r", tmp_path / "other")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    found = next(Reference(derive(target, (1,)), target, "float32", "int8", embedding).goldens([tokens]))
    expected = next(Reference(derive(same, (1,)), same, "float32").goldens([tokens]))
    assert torch.allclose(found.baseline.projected, expected.baseline.projected, rtol=1e-9)


def test_reference_rounds_matrices_and_leaves_vectors(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "m", dtype=torch.float32)
    target = opened(tmp_path / "m", tmp_path)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    narrow, wide = (next(Reference(target, target, "float32", how).goldens([tokens])) for how in ("int8", None))
    again = {name: rounded(w) if w.dim() == 2 else w for name, w in whole.items()}
    from safetensors.torch import save_file

    shutil.copytree(tmp_path / "m", tmp_path / "r")
    for old in (tmp_path / "r").glob("*.safetensors*"):
        old.unlink()
    save_file(again, tmp_path / "r" / "model.safetensors")
    same = opened(tmp_path / "r", tmp_path / "other")
    expected = next(Reference(same, same, "float32").goldens([tokens]))
    assert torch.allclose(narrow.baseline.projected, expected.baseline.projected, rtol=1e-9)
    assert not torch.allclose(narrow.baseline.projected, wide.baseline.projected, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("weights: int8", "weights: int2"), "weights: found"),
        (("name: narrow", "name: narrow\nbackend: {name: neuron, target: trn2}"), "only inductor on a CPU"),
        (("name: narrow", "name: narrow\nbackend: {name: inductor, device: cuda}"), "only inductor on a CPU"),
    ],
)
def test_recipe_says_what_it_cannot_have(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(RecipeError, match=words):
        load(tmp_path / "r.yaml")


def test_recipe_without_a_choice_stores_the_dtype(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(", weights: int8", ""))
    recipe = load(tmp_path / "r.yaml")
    assert (recipe.target.weights, recipe.draft_weights) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("narrow", [("target", "draft"), ("draft",)])
def test_build_passes_its_gates_and_says_what_rounding_cost(
    tmp_path: Path, narrow: tuple[str, ...], weights: str
) -> None:
    from pipeline.build import BuildSettings, run

    shutil.copy(ROOT / "recipes/prompts/pico.jsonl", tmp_path)
    text = (
        RECIPE if "target" in narrow else RECIPE.replace(", weights: int8", "").replace("[0]}}", "[0]}, weights: int8}")
    )
    (tmp_path / "r.yaml").write_text(text.replace("weights: int8", f"weights: {weights}"))
    out = tmp_path / "narrow"
    run(BuildSettings(recipe=load(tmp_path / "r.yaml"), base=tmp_path, out=out, cache=tmp_path / "cache", workers=2))
    report = json.loads((out / "reports" / "parity.json").read_text())
    assert all(gate["passed"] for gate in report["gates"])
    assert (report["parity"]["target"]["rounding"] is not None) == ("target" in narrow)
    for model in narrow:
        rounding = report["parity"][model]["rounding"]
        assert rounding["logit_error"] > rounding["logit_noise"] > 0
        assert 0.8 < rounding["same_choice"] <= 1
