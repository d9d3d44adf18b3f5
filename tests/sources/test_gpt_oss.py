"""Checkpoints of gpt-oss: experts in one tensor, gate and up in turn, in bfloat16 and in MXFP4."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.graphs.packing import BlockPacking, Packing, PlainPacking
from pipeline.models.weights import OFFSET
from pipeline.sources.derived import derive
from pipeline.sources.remote import RemoteFile
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.shard_files import write_shards
from pipeline.validate.reference.skeleton import for_module
from support.checkpoints import opened, refusal
from support.gpt_oss import write_both
from support.shards import pair_of

BOTH = ("bfloat16", "mxfp4")
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpt-oss")
    write_both(root)
    return root


@pytest.mark.parametrize("folder", BOTH)
def test_weights_are_those_that_transformers_reads(root: Path, folder: str) -> None:
    """Put together again as its modules have them; of MXFP4, what its own function makes of the blocks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "bfloat16", dtype=torch.float32)
    checkpoint = opened(folder, root)
    ours = {name: read_tensor(ref).float() for name, ref in weights(checkpoint).items()}
    found, wanted = for_module(model.state_dict(), ours, checkpoint.config), model.state_dict()
    assert len(found) > 30
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.float()), name


def test_weights_of_both_are_equal_in_any_rows(root: Path) -> None:
    plain, packed = (weights(opened(folder, root)) for folder in BOTH)
    assert set(plain) == set(packed)
    for name, ref in plain.items():
        assert torch.equal(read_tensor(ref).float(), read_tensor(packed[name]).float()), name
        if ".experts." in name:
            whole = read_tensor(ref)
            for first, last in ((0, 1), (7, 23), (ref.shape[0] - 1, ref.shape[0])):
                for source in (ref, packed[name]):
                    assert torch.equal(read_tensor(source.rows(first, last)).float(), whole[first:last].float()), name


@pytest.mark.parametrize(
    ("packing", "narrow"),
    [(PlainPacking(), None), (BlockPacking(), None), (BlockPacking(), "int8")],
    ids=["plain", "block", "int8"],
)
def test_write_shards_of_both_have_the_same_bits(root: Path, tmp_path: Path, packing: Packing, narrow: Any) -> None:
    shards = []
    for folder in BOTH:
        target = opened(folder, root)
        pair = pair_of(target, derive(target, (0,)), tp=4, dtype="bfloat16", replicated=False)
        pair = replace(pair, target_weights=narrow)
        shards.append(write_shards(pair, target, derive(target, (0,)), tmp_path / folder, packing=packing))
    for one, other in zip(*shards, strict=True):
        plain, packed = load_file(one.path), load_file(other.path)
        assert set(plain) == set(packed)
        assert all(torch.equal(tensor, packed[name]) for name, tensor in plain.items())


def test_write_shards_each_rank_holds_its_slice_of_every_expert(root: Path, tmp_path: Path) -> None:
    target, stored = opened("mxfp4", root), load_file(root / "bfloat16" / "model.safetensors")
    pair = pair_of(target, target, tp=2, dtype="bfloat16", replicated=False)
    for shard in write_shards(pair, target, target, tmp_path / "out", packing=PlainPacking()):
        found, own = load_file(shard.path), slice(48 * shard.rank, 48 * (shard.rank + 1))
        del found[OFFSET]
        gate_up, biases = stored[f"{EXPERTS}.gate_up_proj"], stored[f"{EXPERTS}.gate_up_proj_bias"]
        for phase, part in enumerate(("gate_proj", "up_proj")):
            assert torch.equal(found[f"{EXPERTS}.{part}.weight"], gate_up[..., phase::2].transpose(1, 2)[:, own])
            assert torch.equal(found[f"{EXPERTS}.{part}.bias"], biases[:, phase::2][:, own])
        assert torch.equal(
            found[f"{EXPERTS}.down_proj.weight"], stored[f"{EXPERTS}.down_proj"].transpose(1, 2)[..., own]
        )
        assert torch.equal(found[f"{EXPERTS}.down_proj.bias"], stored[f"{EXPERTS}.down_proj_bias"])
        assert torch.equal(found["model.layers.1.mlp.gate.bias"], stored["model.layers.1.mlp.router.bias"])


@pytest.mark.parametrize("folder", BOTH)
def test_write_shards_of_a_store_have_the_same_bits(root: Path, tmp_path: Path, folder: str) -> None:
    local = opened(folder, root)
    data = (root / folder / "model.safetensors").read_bytes()

    def fetch(offset: int, buffer: memoryview) -> int:
        piece = data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    file = RemoteFile("model.safetensors", len(data), "store/model.safetensors", fetch)
    stored, draft = replace(local, remote={"model.safetensors": file}), derive(local, (0,))
    shards = [
        write_shards(pair_of(m, draft), m, draft, tmp_path / name, packing=PlainPacking())
        for name, m in (("local", local), ("stored", stored))
    ]
    assert [shard.sha256 for shard in shards[0]] == [shard.sha256 for shard in shards[1]]


def pop(name: str) -> Any:
    return lambda tensors: tensors.pop(f"{EXPERTS}.{name}")


def changed(name: str, change: Any) -> Any:
    return lambda tensors: tensors.update({f"{EXPERTS}.{name}": change(tensors[f"{EXPERTS}.{name}"]).contiguous()})


MISFITS: dict[str, tuple[str, Any, str]] = {
    "outputs first": ("bfloat16", changed("gate_up_proj", lambda t: t.transpose(1, 2)), r"wrong shape of .*gate_proj"),
    "halves of odd length": ("bfloat16", changed("gate_up_proj", lambda t: t[..., 1:]), r"missing .*0\.gate_proj"),
    "integers": ("bfloat16", changed("gate_up_proj", lambda t: t.to(torch.int8)), r"missing .*experts\.0\.gate_proj"),
    "integer biases": ("bfloat16", changed("gate_up_proj_bias", lambda t: t.int()), r"gate_proj\.bias.*: I32"),
    "down in integers": ("bfloat16", changed("down_proj", lambda t: t.to(torch.int8)), "down_proj.*: I8"),
    "no biases": ("bfloat16", pop("down_proj_bias"), r"missing weight .*experts\.0\.down_proj\.bias"),
    "an expert less": ("bfloat16", changed("down_proj", lambda t: t[1:]), r"missing weight .*experts\.4\.down_proj"),
    "no exponents": ("mxfp4", pop("down_proj_scales"), "down_proj has no _scales"),
    "exponents of fewer blocks": ("mxfp4", changed("down_proj_scales", lambda t: t[..., 1:]), "has exponents"),
    "blocks without a config": ("mxfp4", None, "38 problems"),
}  # fmt: skip


@pytest.mark.parametrize(("folder", "change", "said"), MISFITS.values(), ids=MISFITS)
def test_open_misfitting_tensors_are_refused(root: Path, tmp_path: Path, folder: str, change: Any, said: str) -> None:
    tensors = load_file(root / folder / "model.safetensors")
    (tmp_path / "m").mkdir()
    config = root / ("bfloat16" if change is None else folder) / "config.json"
    (tmp_path / "m" / "config.json").write_text(config.read_text())
    if change is not None:
        change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert re.search(said, refusal("m", tmp_path))
