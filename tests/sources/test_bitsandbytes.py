"""Checkpoints of bitsandbytes: scales in several blocks, and one error for each damaged or misfitting state.

`test_quantised.py` compares the values of every layout with bitsandbytes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import SourceError
from pipeline.sources.bitsandbytes import STATE, STATE_BYTES
from pipeline.sources.packed import PackedRef
from pipeline.sources.remote import PAGE_BYTES, RemoteFile
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.checks import log_quantised
from support.checkpoints import opened, refusal
from support.quantisers import TOOLS, Tensors, bnb_8, bnb_config, write_quantised

UP = "model.layers.0.mlp.up_proj"
NF4 = f"{UP}.weight.{STATE}nf4"
Change = Callable[[Tensors], Any]


def test_rows_between_nested_scales(tmp_path: Path) -> None:
    """512 blocks of values have two nested scales; rows 120 to 140 have blocks 240 to 280."""
    values = write_quantised(tmp_path / "m", TOOLS["nf4, double"])[f"{UP}.weight"]
    found = weights(opened("m", tmp_path))[f"{UP}.weight"]
    assert isinstance(found, PackedRef)
    assert found.nested is not None
    assert found.nested.scales.shape == (2,)
    for first, last in ((120, 140), (127, 128), (128, 129), (130, 256), (0, 256)):
        assert torch.equal(read_tensor(found.rows(first, last)), values[first:last]), (first, last)
    assert [cut.nbytes for cut in found.rows(120, 140).cuts] == [20 * 64, 20 * 2, 2 * 4, 256 * 4]
    assert [cut.nbytes for cut in found.rows(130, 140).cuts][2] == 4


def test_a_module_that_the_file_stores_unquantised_is_read_as_it_is(tmp_path: Path) -> None:
    """transformers converts no module of `llm_int8_skip_modules`, nor the LM head."""
    tool = TOOLS["nf4"]
    values = write_quantised(tmp_path / "m", replace(tool, config=bnb_config(llm_int8_skip_modules=["lm_head"])))
    found = read_tensor(weights(opened("m", tmp_path))["lm_head.weight"])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), values["lm_head.weight"])


@pytest.mark.parametrize("tool", ["nf4, double", "bitsandbytes int8"])
def test_open_a_left_out_module_that_is_quantised_is_refused(tmp_path: Path, tool: str) -> None:
    config = TOOLS[tool].config | {"llm_int8_skip_modules": ["lm_head", "layers.0.mlp"]}
    write_quantised(tmp_path / "m", replace(TOOLS[tool], config=config | {"llm_int8_skip_modules": [UP]}))
    assert f"{UP} is one that quantization_config leaves out" in refusal("m", tmp_path)


def test_log_quantised_says_that_activations_of_8_bits_are_not_rounded(tmp_path: Path) -> None:
    lines = list[str]()
    for name, tool in (("four", TOOLS["nf4"]), ("eight", bnb_8())):
        write_quantised(tmp_path / name, tool)
        checkpoint = opened(name, tmp_path)
        log_quantised((checkpoint, checkpoint), lines.append)
    assert [line for line in lines if line.startswith("target")] == [
        "target: the checkpoint's bitsandbytes weights are dequantised",
        "target: the checkpoint's bitsandbytes weights are dequantised",
        "target: warning: activations are not rounded; quantization_config.load_in_8bit says that they were",
    ]


def state(**changes: Any) -> Change:
    """Return a change of fields of a state; None removes a field."""

    def change(tensors: Tensors) -> None:
        fields = json.loads(bytes(tensors[NF4].numpy())) | changes
        tensors[NF4] = text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return change


def text(data: str) -> Tensor:
    return torch.frombuffer(bytearray(data.encode()), dtype=torch.uint8)


def put(part: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{part}": tensor})


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def edit(part: str, function: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{part}": function(tensors[f"{UP}.{part}"]).contiguous()})


def renamed(tensors: Tensors) -> None:
    tensors[f"{UP}.weight.{STATE}fp4"] = tensors.pop(NF4)


QUANT_STATE = f"weight.{STATE}nf4"
DAMAGED: dict[str, tuple[Change, str]] = {
    "no state": (drop(QUANT_STATE), f"has 0 tensors {STATE}*, expected one; found: absmax, nested_absmax"),
    "two states": (put(f"weight.{STATE}fp4", text("{}")), f"has 2 tensors {STATE}*, expected one"),
    "state of another type": (renamed, 'quant_type: "nf4"; accepted: fp4'),
    "not JSON": (put(QUANT_STATE, text("{")), "nf4 that is not JSON"),
    "not text": (put(QUANT_STATE, torch.full((64,), 255, dtype=torch.uint8)), "nf4 that is not JSON"),
    "empty": (put(QUANT_STATE, torch.zeros(0, dtype=torch.uint8)), "nf4 that is not JSON"),
    "deep": (put(QUANT_STATE, text("[" * STATE_BYTES)), "nf4 that is not JSON: nested too deeply"),
    "long": (put(QUANT_STATE, text("{}" + " " * STATE_BYTES)), "nf4 of dtype U8 and 4,098 bytes, limit 4,096"),
    "of numbers": (put(QUANT_STATE, torch.zeros(4)), "nf4 of dtype F32 and 16 bytes"),
    "a list": (put(QUANT_STATE, text("[1]")), "nf4 that is not a JSON object"),
    "an unknown field": (state(rotation="hadamard"), 'with the field "rotation", which is not supported'),
    "no type": (state(quant_type=None), "quant_type: missing; accepted: nf4"),
    "blocks of 0": (state(blocksize=0), "blocksize: 0; accepted: 32, 64"),
    "blocks of -64": (state(blocksize=-64), "blocksize: -64; accepted"),
    "blocks of 2^70": (state(blocksize=2**70), "blocksize: 1180591620717411303424; accepted"),
    "blocks of 64.0": (state(blocksize=64.0), "blocksize: 64.0; accepted"),
    "blocks of true": (state(blocksize=True), "blocksize: true; accepted"),
    "blocks as a list": (state(blocksize=[64]), "blocksize: [64]; accepted"),
    "another size of blocks": (state(blocksize=128), "absmax [512] of dtype U8, expected [256] of dtype U8"),
    "blocks that straddle rows": (state(blocksize=256), "rows of 128 values, which blocks of 256 values straddle"),
    "another dtype": (state(dtype="float8_e4m3fn"), 'dtype: "float8_e4m3fn"; accepted: bfloat16, float16, float32'),
    "no shape": (state(shape=None), "shape: missing; expected two positive integers"),
    "a shape of three": (state(shape=[2, 128, 128]), "shape: [2, 128, 128]; expected two"),
    "a shape below 0": (state(shape=[-256, -128]), "shape: [-256, -128]; expected two"),
    "a shape of text": (state(shape="256"), 'shape: "256"; expected two'),
    "a huge shape": (state(shape=[2**40, 128]), "shape: [1099511627776, 128]; expected two"),
    "a larger shape": (state(shape=[2**30, 128]), "[16384, 1] of dtype U8, expected [68719476736, 1] of dtype U8"),
    "columns as rows": (state(shape=[128, 256]), "wrong shape of model.layers.0.mlp.up_proj.weight"),
    "no nested size": (state(nested_blocksize=None), "nested_blocksize: missing; accepted: 32"),
    "nested blocks of 0": (state(nested_blocksize=0), "nested_blocksize: 0; accepted"),
    "no offset": (state(nested_offset=None), "nested_offset: missing; expected a finite number"),
    "an infinite offset": (state(nested_offset=float("inf")), "nested_offset: Infinity; expected a finite number"),
    "an offset that is no number": (state(nested_offset=float("nan")), "nested_offset: NaN; expected a finite"),
    "an offset as text": (state(nested_offset="0.1"), 'nested_offset: "0.1"; expected a finite'),
    "a nested dtype": (state(nested_dtype="float16"), 'nested_dtype: "float16"; accepted: float32'),
    "no nested scales": (drop("weight.nested_absmax"), "has no nested_absmax; found: absmax, nested_quant_map"),
    "one nested scale": (edit("weight.nested_absmax", lambda t: t[:1]), "nested_absmax [1] of dtype F32, expected [2]"),
    "a short nested map": (edit("weight.nested_quant_map", lambda t: t[:16]), "nested_quant_map [16] of dtype F32"),
    "no scales": (drop("weight.absmax"), "has no absmax; found: nested_absmax"),
    "scales as numbers": (edit("weight.absmax", Tensor.float), "absmax [512] of dtype F32, expected [512] of dtype U8"),
    "no map": (drop("weight.quant_map"), "has no quant_map; found: absmax"),
    "a map of 8": (edit("weight.quant_map", lambda t: t[:8]), "quant_map [8] of dtype F32, expected [16]"),
    "a map in reverse": (edit("weight.quant_map", lambda t: t.flip(0)), "has a quant_map that is not the one of nf4"),
    "a map of NaN": (edit("weight.quant_map", lambda t: t * torch.nan), "has a quant_map that is not the one of nf4"),
    "codes in a row": (edit("weight", lambda t: t.T), "weight [1, 16384] of dtype U8, expected [16384, 1]"),
    "half of the codes": (edit("weight", lambda t: t[::2]), "weight [8192, 1] of dtype U8, expected [16384, 1]"),
    "no codes": (drop("weight"), "has no weight; found: absmax"),
    "numbers": (put("weight", torch.zeros(256, 128)), "weight [256, 128] of dtype F32, expected [16384, 1]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nf4")
    write_quantised(root / "m", TOOLS["nf4, double"])
    return root


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_open_a_damaged_matrix_of_4_bits_is_one_error(stored: Path, tmp_path: Path, change: Change, said: str) -> None:
    assert said in refused(stored, tmp_path, change)


BYTES: dict[str, tuple[Change, str]] = {
    "no scales": (drop("SCB"), f"{UP} has no SCB; found: weight, weight_format"),
    "scales of columns": (put("SCB", torch.ones(32)), "SCB [32] of dtype F32, expected [64] of dtype F32"),
    "scales in float16": (put("SCB", torch.ones(64).half()), "SCB [64] of dtype F16, expected [64] of dtype F32"),
    "another layout": (put("weight_format", torch.tensor(2, dtype=torch.uint8)), "has a weight_format other than 0"),
    "layout of numbers": (put("weight_format", torch.tensor(0.0)), "has a weight_format other than 0"),
    "layouts": (put("weight_format", torch.zeros(2, dtype=torch.uint8)), "has a weight_format other than 0"),
    "no weight": (drop("weight"), "has no weight; found: SCB, weight_format"),
    "4 bits": (put("weight", torch.zeros(64, 32, dtype=torch.uint8)), "dtype U8, expected a matrix of dtype I8"),
    "a vector": (put("weight", torch.zeros(64, dtype=torch.int8)), "weight [64] of dtype I8, expected a matrix"),
}


@pytest.fixture(scope="module")
def stored_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("int8")
    write_quantised(root / "m", bnb_8())
    return root


@pytest.mark.parametrize(("change", "said"), BYTES.values(), ids=BYTES)
def test_open_a_damaged_matrix_of_8_bits_is_one_error(
    stored_8: Path, tmp_path: Path, change: Change, said: str
) -> None:
    assert said in refused(stored_8, tmp_path, change)


def test_open_a_matrix_of_8_bits_without_a_layout(stored_8: Path, tmp_path: Path) -> None:
    """Early versions of bitsandbytes write no `weight_format`."""
    expected = read_tensor(weights(opened("m", stored_8))[f"{UP}.weight"])
    changed(stored_8, tmp_path, drop("weight_format"))
    assert torch.equal(read_tensor(weights(opened("m", tmp_path))[f"{UP}.weight"]), expected)


def refused(stored: Path, tmp_path: Path, change: Change) -> str:
    """Return the error of a changed checkpoint, which names module, file and fix."""
    changed(stored, tmp_path, change)
    with pytest.raises(SourceError) as caught:
        opened("m", tmp_path)
    assert UP in caught.value.what
    assert str(tmp_path / "m") in caught.value.where
    assert caught.value.fix
    return caught.value.what


def changed(stored: Path, tmp_path: Path, change: Change) -> None:
    """Write a copy of a checkpoint with other tensors."""
    tensors = load_file(stored / "m" / "model.safetensors")
    change(tensors)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((stored / "m" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "m" / "model.safetensors")


def test_open_of_a_store_fetches_states_together(tmp_path: Path) -> None:
    """A request for each state in turn would take a minute for a large model; values are not fetched to open it."""
    write_quantised(tmp_path / "m", TOOLS["nf4, double"], hidden_size=1024, intermediate_size=2048)
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    together, most, fetched = 0, 0, Counter[int]()

    def fetch(offset: int, buffer: memoryview) -> int:
        nonlocal together, most
        together += 1
        most = max(most, together)
        time.sleep(0.01)
        buffer[:] = data[offset : offset + len(buffer)]
        fetched[offset // PAGE_BYTES] += 1
        together -= 1
        return len(buffer)

    local = opened("m", tmp_path)
    file = RemoteFile("model.safetensors", len(data), "store/m", fetch)
    remote = replace(local, remote={"model.safetensors": file})
    assert weights(remote).keys() == weights(local).keys()
    assert set(fetched.values()) == {1}
    assert most > 1
    assert len(fetched) < file.size // PAGE_BYTES / 2
    weights(remote)
    assert set(fetched.values()) == {1}


def test_piece_fetches_each_page_once() -> None:
    data, fetched = bytes(range(256)) * 1024, list[tuple[int, int]]()

    def fetch(offset: int, buffer: memoryview) -> int:
        buffer[:] = data[offset : offset + len(buffer)]
        fetched.append((offset, len(buffer)))
        return len(buffer)

    file = RemoteFile("a", len(data) - 100, "store/a", fetch)
    assert file.start(8) == data[:8]
    for offset, length in ((0, 8), (PAGE_BYTES - 3, 7), (PAGE_BYTES - 3, 7), (3 * PAGE_BYTES + 5, 40), (9, 0)):
        assert file.piece(offset, length) == data[offset : offset + length]
    last = 3 * PAGE_BYTES
    file.prefetch([(0, 8), (last, 40)])
    assert file.pages.keys() == {0, 1, 3}
    assert fetched == [(0, PAGE_BYTES), (PAGE_BYTES, PAGE_BYTES), (last, len(data) - 100 - last)]
