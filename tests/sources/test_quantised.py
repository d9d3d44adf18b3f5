"""Quantised checkpoints: every value equals that of the format's own reader, or of its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.graphs.packing import PlainPacking
from pipeline.models.weights import OFFSET
from pipeline.sources.packed import PackedRef
from pipeline.sources.quantised import BLOCKS, EXPONENTS, Module, mxfp4
from pipeline.sources.tensors import read_header
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.shard_files import write_shards
from support.checkpoints import opened
from support.quantisers import TOOLS, Tool, fp8_blocks, write_quantised
from support.shards import expected_slice, pair_of


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_read_tensor_values_are_those_of_the_format(tmp_path: Path, tool: Tool) -> None:
    values = write_quantised(tmp_path / "m", tool, files=3)
    found = weights(opened("m", tmp_path))
    assert set(found) == set(values)
    quantised = [name for name, ref in found.items() if isinstance(ref, PackedRef)]
    assert len(quantised) == 14
    for name, ref in found.items():
        assert torch.equal(read_tensor(ref).float(), values[name]), name
    for first, last in ((0, 1), (7, 23), (11, 12), (31, 32)):  # rows that start within words and blocks
        for name in quantised:
            assert torch.equal(read_tensor(found[name].rows(first, last)), values[name][first:last]), name


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_write_shards_each_rank_holds_its_slice_of_a_quantised_matrix(tmp_path: Path, tool: Tool, tp: int) -> None:
    values = write_quantised(tmp_path / "m", tool)
    target = opened("m", tmp_path)
    pair = pair_of(target, target, tp=tp, dtype="bfloat16", replicated=False)
    for shard in write_shards(pair, target, target, tmp_path / "out", packing=PlainPacking()):
        found = load_file(shard.path)
        del found[OFFSET]
        for name, tensor in found.items():
            want = expected_slice(name, values[name], shard.rank, tp, kv_heads=2, head_dim=16)
            assert torch.equal(tensor[: len(want)], want.bfloat16()), (name, shard.rank)


def test_fp8_blocks_equal_those_of_transformers(tmp_path: Path) -> None:
    write_quantised(tmp_path / "m", fp8_blocks((16, 16)))
    stored, found = load_file(tmp_path / "m" / "model.safetensors"), weights(opened("m", tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    want = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.float32)
    assert torch.equal(read_tensor(found[name]), want)


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(110, 140, (3, 12, 2), generator=generator, dtype=torch.uint8)
    save_file({"a_blocks": blocks, "a_scales": exponents}, tmp_path / "m.safetensors")
    stored = read_header(tmp_path / "m.safetensors")
    found = list(mxfp4(Module("a", {BLOCKS: stored["a_blocks"], EXPONENTS: stored["a_scales"]})))
    want = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32).transpose(1, 2)
    for expert, ref in enumerate(found):
        assert torch.equal(read_tensor(ref), want[expert])
        assert torch.equal(read_tensor(ref.rows(5, 9)), want[expert][5:9])
