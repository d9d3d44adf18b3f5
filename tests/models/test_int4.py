"""4-bit weights: against GGML's own Q4_0, what is stored, what references round to, what a recipe may say."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from pipeline.graphs.packing import BlockPacking, unpacked_int4
from pipeline.graphs.spec import ModelsSpec
from pipeline.models import int8
from pipeline.models.families import config_of
from pipeline.models.int4 import dequantised, quantise, rounded
from pipeline.models.weights import takes_four_bits
from pipeline.plan.conflicts import conflicts
from pipeline.recipe.schema import Recipe
from pipeline.stages.shard_files import write_shards
from pipeline.validate.reference.layers import Reference
from support.checkpoints import CONFIG, write_checkpoint
from support.shards import expected_slice, opened, pair_of

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_values_are_those_of_ggml(scale):
    torch.manual_seed(0)
    weight = torch.randn(70, 192) * scale
    weight[3, 32:64] = 0
    known = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0),
                                   gguf.GGMLQuantizationType.Q4_0)  # fmt: skip
    ours = rounded(weight).numpy()
    # GGML divides by the scale before it is float16: a value between two codes may round the other way.
    assert np.isclose(ours, known, atol=0, rtol=1e-6).mean() > 0.998
    steps = np.repeat(np.abs(known.reshape(70, 6, 32)).max(-1) / 7, 32, axis=-1).reshape(70, 192)
    assert (np.abs(ours - known) <= steps * 1.01).all()
    assert (ours[3, 32:64] == 0).all()


def test_the_largest_value_of_a_group_is_kept():
    weight = torch.linspace(-1, 0.75, 64).view(2, 32)
    assert rounded(weight)[0, 0] == -1
    assert rounded(weight)[1, -1] == 0.75


@pytest.mark.parametrize("rows", [64, 45])
def test_blocks_hold_codes_and_scales(rows):
    torch.manual_seed(0)
    codes, scales = quantise(torch.randn(rows, 96))
    out = torch.empty(BlockPacking().packed_shape((rows, 96), "linear", "uint8"), dtype=torch.uint8)
    BlockPacking().pack(codes, "linear", out, scales)
    found = unpacked_int4(out)
    assert torch.equal(found[0][:rows], codes)
    assert torch.equal(found[1][:rows], scales)
    assert (dequantised(*found)[rows:] == 0).all(), "padding stands for zeros"
    assert out.numel() == 64 * 96 * 4.5 / 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.3.mlp.down_proj.weight", True),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", True),
        ("fc.weight", True),
        ("model.layers.0.mlp.experts.gate_proj.weight", True),
        ("model.layers.0.mlp.experts.7.down_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
    ],
)
def test_projections_alone_take_four_bits(name, expected):
    assert takes_four_bits(name) is expected


def of_both(name, weight):
    """What a matrix stands for under `weights: int4`."""
    return (rounded if takes_four_bits(name) else int8.rounded)(weight) if weight.dim() == 2 else weight


@pytest.mark.parametrize("tp", [1, 2])
def test_shards_hold_blocks_of_codes_with_the_scales_of_whole_rows(tmp_path, tp):
    whole = write_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **WIDTHS)
    target = opened(tmp_path / "m", tmp_path)
    pair = replace(pair_of(target, target, tp=tp, dtype="bfloat16", replicated=False), target_weights="int4")
    shards = list(write_shards(pair, target, target, tmp_path / "out", packing=BlockPacking()))
    seen = set()
    for shard in (shard for shard in shards if shard.model == "target"):
        for name, stored in load_file(shard.path).items():
            if not takes_four_bits(name):
                assert stored.dtype != torch.uint8, name
                continue
            seen.add(name)
            assert stored.dtype == torch.uint8
            found = dequantised(*unpacked_int4(stored))
            want = expected_slice(name, rounded(whole[name]), shard.rank, tp, kv_heads=2, head_dim=32)
            assert torch.equal(found[: len(want)], want), name
            assert not found[len(want) :].any()
    assert {name for name in whole if takes_four_bits(name)} == seen


def test_reference_rounds_each_matrix_as_it_is_stored(tmp_path):
    whole = write_checkpoint(tmp_path / "m", dtype=torch.float32, **WIDTHS)
    write_checkpoint(tmp_path / "r", {name: of_both(name, weight) for name, weight in whole.items()}, **WIDTHS)
    target, same = opened(tmp_path / "m", tmp_path), opened(tmp_path / "r", tmp_path / "other")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    found, plain = (next(Reference(target, target, "float32", how).goldens([tokens])) for how in ("int4", None))
    expected = next(Reference(same, same, "float32").goldens([tokens]))
    assert torch.allclose(found.baseline.projected, expected.baseline.projected, rtol=1e-9)
    assert not torch.allclose(found.baseline.projected, plain.baseline.projected, rtol=1e-3)


@pytest.mark.parametrize(("tp", "inputs", "fix"), [(1, 80, "write weights: int8"), (4, 16, "or use fewer ranks")])
def test_inputs_that_are_no_whole_groups_are_a_conflict(tp, inputs, fix):
    config = config_of(CONFIG | WIDTHS | {"num_key_value_heads": 4, "intermediate_size": inputs * tp}, "test")
    recipe = Recipe.model_validate(
        {
            "name": "narrow",
            "target": {"source": "a", "weights": "int4"},
            "draft": {"derive": {"from": "target", "layers": [0]}, "weights": "int8"},
            "speculation": {"draft_tokens": [2]},
            "shapes": {"batch": [1], "prefill": [16], "kv": [64]},
            "parallel": {"tensor": tp},
            "validate": {"prompts": "pico.jsonl", "max_new_tokens": 6},
        }
    )
    (problem,) = conflicts(recipe, config, config)
    assert f"model.layers.0.mlp.down_proj.weight has {inputs} inputs on a rank" in problem.what
    assert problem.fix.endswith(fix)


def test_a_manifest_with_another_word_is_rejected():
    adapter = TypeAdapter(ModelsSpec)
    config = config_of(CONFIG | WIDTHS, "test")
    known = adapter.dump_python(ModelsSpec(config, config, "bfloat16", "bfloat16", 1, True, "int4"))
    assert adapter.validate_python(known).target_weights == "int4"
    with pytest.raises(ValidationError, match="target_weights"):
        adapter.validate_python(known | {"target_weights": "int2"})
