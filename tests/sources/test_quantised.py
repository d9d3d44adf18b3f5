"""Quantised checkpoints: every value equals that of the format's own reader, or of its definition."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.errors import SourceError
from pipeline.graphs.packing import BlockPacking, PlainPacking
from pipeline.models.families import config_of
from pipeline.models.int8 import quantise
from pipeline.models.weights import OFFSET
from pipeline.nxdi.build import reject_quantised
from pipeline.sources.derived import derive
from pipeline.sources.packed import PackedRef, Source
from pipeline.sources.quantised import BLOCKS, EXPONENTS, mxfp4
from pipeline.sources.quantised_module import Module
from pipeline.sources.remote import PAGE_BYTES, RemoteFile
from pipeline.sources.tensors import read_header
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.checks import log_quantised
from pipeline.stages.shard import shard_key
from pipeline.stages.shard_files import write_shards
from support.checkpoints import CONFIG, opened, refusal
from support.quantisers import TOOLS, Tool, bnb_config, fp8_blocks, gptq, write_quantised
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
@pytest.mark.parametrize("tp", [4])
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


@pytest.mark.parametrize("tool", ["gptq 4, order", "nf4, double"])
def test_write_shards_int8_of_a_quantised_matrix(tmp_path: Path, tool: str) -> None:
    """Scales are those of whole rows of the dequantised matrix, also where ranks hold columns."""
    values = write_quantised(tmp_path / "m", TOOLS[tool])
    target = opened("m", tmp_path)
    pair = replace(pair_of(target, target, tp=2, dtype="bfloat16", replicated=False), target_weights="int8")
    for shard in write_shards(pair, target, target, tmp_path / "out", packing=BlockPacking()):
        if shard.model != "target":
            continue
        found = load_file(shard.path)
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            integers, scale = quantise(values[name])
            rank = expected_slice(name, integers, shard.rank, 2, kv_heads=2, head_dim=16)
            stored = BlockPacking().packed_shape(tuple(rank.shape), "linear", "int8")
            of_rank = scale if "down" in name else expected_slice(name, scale, shard.rank, 2, kv_heads=2, head_dim=16)
            want = torch.empty(stored, dtype=torch.int8)
            BlockPacking().pack(rank, "linear", want, of_rank)
            assert torch.equal(found[name], want)


@pytest.mark.parametrize(
    "tool", ["fp8 blocks", "gptq 4, order", "awq", "w4a16, zero points", "nf4, double", "bitsandbytes int8"]
)
def test_write_shards_of_a_store_fetches_values_once(tmp_path: Path, tool: str) -> None:
    write_quantised(tmp_path / "m", TOOLS[tool], intermediate_size=2048, files=2)
    local, fetched = opened("m", tmp_path), Counter[str]()

    def remote(path: Path) -> RemoteFile:
        data = path.read_bytes()

        def fetch(offset: int, buffer: memoryview) -> int:
            piece = data[offset : offset + len(buffer)]
            buffer[: len(piece)] = piece
            fetched[path.name] += len(piece)
            return len(piece)

        return RemoteFile(path.name, len(data), f"store/{path.name}", fetch)

    files = {path.name: remote(path) for path in (tmp_path / "m").glob("*.safetensors")}
    stored = replace(local, remote=files)
    draft = derive(local, (0,))
    shards = [
        write_shards(pair_of(m, draft), m, draft, tmp_path / name, packing=PlainPacking())
        for name, m in (("local", local), ("stored", stored))
    ]
    assert [shard.sha256 for shard in shards[0]] == [shard.sha256 for shard in shards[1]]
    small = sum(sum(ref.nbytes for ref in found.refs[1:]) for found in weights(local).values() if is_packed(found))
    whole = sum(file.size for file in files.values())
    pages = sum(len(page) for file in files.values() for page in file.pages.values())
    assert sum(fetched.values()) <= whole + small + pages + sum(8 for _ in files)
    assert pages <= sum(-(-file.size // PAGE_BYTES) * PAGE_BYTES for file in files.values())


def is_packed(source: Source) -> TypeGuard[PackedRef]:
    return isinstance(source, PackedRef)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16, "strategy": "group"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP}}


def group(**changes: Any) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": GROUP | changes}}


def matrices(**changes: Any) -> dict[str, Any]:
    return group(weights=GROUP["weights"] | changes)  # type: ignore[operator]


REFUSED: dict[str, tuple[Any, str]] = {
    "not an object": ("fp8", 'quantization_config="fp8": expected an object'),
    "no method": ({"load_in_4bit": True}, "quant_method=null: this quantisation is not supported"),
    "unknown method": ({"quant_method": "hqq"}, 'quant_method="hqq": this quantisation is not supported'),
    "bitsandbytes of no bits": ({"quant_method": "bitsandbytes"}, "load_in_4bit=null: load_in_8bit=null: exactly one"),
    "bitsandbytes of 4 and 8 bits": (bnb_config(load_in_8bit=True), "load_in_4bit=true: load_in_8bit=true"),
    "4 bits as a number": (bnb_config(load_in_4bit=1), "load_in_4bit=1: expected true or false"),
    "two answers": (bnb_config(_load_in_4bit=False), "_load_in_4bit=false: load_in_4bit differs"),
    "codes in bfloat16": (bnb_config(bnb_4bit_quant_storage="bfloat16"), 'bnb_4bit_quant_storage="bfloat16"'),
    "af4": (bnb_config(bnb_4bit_quant_type="af4"), 'bnb_4bit_quant_type="af4"'),
    "rounded at each use": (
        bnb_config(load_in_4bit=False, load_in_8bit=True, llm_int8_has_fp16_weight=True),
        "llm_int8_has_fp16_weight=true",
    ),
    "a field of later versions": (bnb_config(bnb_4bit_rotation=True), "bnb_4bit_rotation=true: this field is not"),
    "fp8 of another kind": ({"quant_method": "fp8", "fmt": "e5m2"}, 'fmt="e5m2"'),
    "a cache in fp8": ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "a block of one number": ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size=128"),
    "experts in fp4": ({"quant_method": "fp8", "expert_dtype": "fp4"}, 'expert_dtype="fp4"'),
    "GPTQ without bits": ({"quant_method": "gptq"}, "bits=null"),
    "GPTQ of 5 bits": ({"quant_method": "gptq", "bits": 5}, "bits=5"),
    "GPTQ by module": ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm": {}}}, "dynamic="),
    "Marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, 'checkpoint_format="marlin"'),
    "AWQ gemv": ({"quant_method": "awq", "version": "gemv"}, 'version="gemv"'),
    "AWQ of llm-awq": ({"quant_method": "awq", "backend": "llm-awq"}, 'backend="llm-awq"'),
    "AWQ of 3 bits": ({"quant_method": "awq", "bits": 3}, "bits=3"),
    "an unknown field": ({"quant_method": "mxfp4", "rotation": "hadamard"}, 'rotation="hadamard"'),
    "no groups": (COMPRESSED | {"config_groups": {}}, "config_groups={}"),
    "a preset": (COMPRESSED | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16"),
    "NVFP4": (COMPRESSED | {"format": "nvfp4-pack-quantized"}, 'format="nvfp4-pack-quantized"'),
    "a group in NVFP4": (group(format="nvfp4-pack-quantized"), "config_groups.group_0.format="),
    "not compressed": (COMPRESSED | {"quantization_status": "frozen"}, 'quantization_status="frozen"'),
    "sparse": (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
    "transforms": (COMPRESSED | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config="),
    "a cache": (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
    "outputs": (group(output_activations={"num_bits": 8}), "group_0.output_activations="),
    "no weights": (group(weights=None), "group_0.weights=null"),
    "targets": (group(targets="Linear"), 'group_0.targets="Linear"'),
    "9 bits": (matrices(num_bits=9), "group_0.weights.num_bits=9"),
    "packed floats": (matrices(type="float"), 'group_0.weights.type="float"'),
    "a strategy": (matrices(strategy="tensor_group"), 'group_0.weights.strategy="tensor_group"'),
    "no size": (matrices(group_size=None), "group_0.weights.group_size=null"),
    "a block without a shape": (matrices(strategy="block"), "group_0.weights.block_structure=null"),
    "an unknown field of weights": (matrices(codebook=[1]), "group_0.weights.codebook=[1]"),
    "dynamic weights": (matrices(dynamic=True), "group_0.weights.dynamic=true"),
}


@pytest.mark.parametrize(("config", "said"), REFUSED.values(), ids=REFUSED)
def test_config_of_refuses_a_quantisation_by_field_name(config: Any, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        config_of(CONFIG | {"quantization_config": config}, "config.json")
    assert said in caught.value.what
    assert caught.value.fix


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj.{name}")


def replaced(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.update({f"model.layers.0.mlp.up_proj.{name}": tensor})


MISFITS: dict[str, tuple[str, Any, str]] = {
    "no scales": ("gptq 4", without("scales"), "up_proj has no scales; found: g_idx, qweight, qzeros"),
    "no fp8 scale": ("fp8 blocks", without("weight_scale_inv"), "up_proj has no weight_scale"),
    "no zero points": ("w4a16, zero points", without("weight_zero_point"), "has no weight_zero_point"),
    "other scales": ("awq", replaced("scales", torch.ones(2, 60).half()), r"has scales \[2, 60\], expected \[2, 64\]"),
    "scales of fp8": ("fp8 blocks", replaced("weight_scale_inv", torch.ones(2, 2)), r"expected \[4, 1\]"),
    "half a matrix": ("awq", replaced("qweight", torch.ones(16, 8).int()), r"wrong shape of .*up_proj.*\[64, 16\]"),
    "groups": ("gptq 4", replaced("g_idx", torch.zeros(31).int()), r"has g_idx \[31\]"),
    "integers as fp8": ("w8a8 fp8", replaced("weight", torch.ones(64, 32).char()), "values of dtype I8"),
    "a lone scale": (
        "fp8 tensor", lambda tensors: tensors.update({"model.norm.weight_scale": torch.ones(1)}),
        "quantised module model.norm has no weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tool", "change", "said"), MISFITS.values(), ids=MISFITS)
def test_open_misfitting_tensors_are_refused(tmp_path: Path, tool: str, change: Any, said: str) -> None:
    write_quantised(tmp_path / "m", TOOLS[tool])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert re.search(said, refusal("m", tmp_path))


def test_open_biases_of_zeros_have_no_effect(tmp_path: Path) -> None:
    """Early packers of GPTQ write a bias for every module; one with another value is an extra weight."""
    write_quantised(tmp_path / "m", TOOLS["gptq 4"])
    tensors, name = load_file(tmp_path / "m" / "model.safetensors"), "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(64).half()}, tmp_path / "m" / "model.safetensors")
    assert opened("m", tmp_path).config.family == "llama"
    save_file(tensors | {name: torch.ones(64).half()}, tmp_path / "m" / "model.safetensors")
    assert f"extra weight {name} [64]" in refusal("m", tmp_path)


def test_open_a_skipped_module_that_is_quantised_is_refused(tmp_path: Path) -> None:
    for tool, key, names in (
        (fp8_blocks((16, 16)), "modules_to_not_convert", ["mlp.gate", "lm_head", "model.layers.1.mlp.up_proj"]),
        (TOOLS["w4a16"], "ignore", ["lm_head", r"re:.*layers\.1\..*up_proj"]),
    ):
        write_quantised(tmp_path / "m", replace(tool, config=tool.config | {key: names}))
        assert "layers.1.mlp.up_proj is one that quantization_config leaves out" in refusal("m", tmp_path)


def test_weights_of_two_groups(tmp_path: Path) -> None:
    """A name or an expression comes before a class, whatever the order of the groups."""
    wide, narrow = TOOLS["w8a16"], TOOLS["w4a16"]
    values = write_quantised(tmp_path / "a", wide), write_quantised(tmp_path / "b", narrow)
    tensors, eights = (load_file(tmp_path / name / "model.safetensors") for name in ("b", "a"))
    down = [name for name in eights if ".down_proj." in name]
    tensors = {name: tensor for name, tensor in tensors.items() if ".down_proj." not in name}
    save_file(tensors | {name: eights[name] for name in down}, tmp_path / "b" / "model.safetensors")
    groups = {"a": narrow.config["config_groups"]["group_0"], "b": wide.config["config_groups"]["group_0"]}
    groups["b"] = groups["b"] | {"targets": [r"re:.*\.down_proj$"]}
    config = CONFIG | {"quantization_config": narrow.config | {"config_groups": groups}}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    for name, ref in weights(opened("b", tmp_path)).items():
        assert torch.equal(read_tensor(ref).float(), values[0 if ".down_proj." in name else 1][name]), name


def test_open_narrow_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    write_quantised(tmp_path / "m", fp8_blocks((16, 16)))
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    assert "F8_E4M3 (quantised, without quantization_config in config.json?)" in refusal("m", tmp_path)


def test_shard_key_names_the_quantisation(tmp_path: Path) -> None:
    """Zero points of GPTQ are stored minus 1 in version 1 only: another config makes other weights."""
    keys = set()
    for config in ({}, {"checkpoint_format": "gptq_v2"}):
        write_quantised(tmp_path / "m", replace(gptq(), config=gptq().config | config))
        target = opened("m", tmp_path)
        keys.add(shard_key(pair_of(target, target), (target, target), PlainPacking()))
    assert len(keys) == 2


def test_log_quantised_says_that_activations_are_not_rounded(tmp_path: Path) -> None:
    """Once for a derived draft, whose weights are its target's."""
    write_quantised(tmp_path / "m", TOOLS["w8a8 int8"])
    target, lines = opened("m", tmp_path), list[str]()
    log_quantised((target, derive(target, (0,))), lines.append)
    assert lines == [
        "target: the checkpoint's compressed-tensors weights are dequantised",
        "target: warning: activations are not rounded; quantization_config.config_groups.group_0.input_activations "
        "says that they were",
    ]


def test_nxdi_rejects_quantised_weights(tmp_path: Path) -> None:
    write_quantised(tmp_path / "m", TOOLS["awq"])
    with pytest.raises(SourceError, match="quantization_config: NxD Inference reads"):
        reject_quantised(opened("m", tmp_path))
