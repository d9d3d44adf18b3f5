"""Shards of the Neuron backend: matrices [in, out], those of one input as one, against transposed plain shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.graphs.packing import InOutPacking, PlainPacking
from pipeline.graphs.signature import stored_weights
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.families import config_of
from pipeline.models.weights import FUSED, HEAD
from pipeline.plan.estimates import weight_bytes
from pipeline.sources.derived import derive
from pipeline.stages import shard_files, windows
from pipeline.stages.shard import shard
from pipeline.stages.shard_files import ShardFile, write_shards
from support.checkpoints import CONFIG, INDEX, write_checkpoint
from support.range_s3 import running as running_s3
from support.shards import in_out, opened, pair_of

EXPERTS = {
    "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
PADDED = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
"""Three query heads of a KV head on two ranks each: the second one has zeros for a head."""


def held(files: list[ShardFile]) -> dict[tuple[str, int], dict[str, Tensor]]:
    """The tensors of each model's ranks, by their names in a signature."""
    return {
        (file.model, file.rank): {f"{file.model}/{name}": tensor for name, tensor in load_file(file.path).items()}
        for file in files
    }


@pytest.mark.parametrize(
    ("fields", "tp"),
    [
        *(({"attention_bias": True, "mlp_bias": True}, tp) for tp in (1, 2, 4, 8)),
        (PADDED, 4), (EXPERTS, 2), ({"tie_word_embeddings": True}, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_write_shards_are_plain_ones_transposed_and_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], tp: int, stored: str
) -> None:
    """Biases, KV heads that ranks share, query heads that are padded, a padded vocabulary, experts; many windows."""
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1 << 12)
    write_checkpoint(tmp_path / "m", files=3, dtype=torch.bfloat16, **fields)
    target = opened(tmp_path / "m", tmp_path)
    models = pair_of(target, target, tp=tp, dtype=stored, replicated=False)
    plain, turned = (
        held(write_shards(models, target, target, tmp_path / packing.name, packing=packing))
        for packing in (PlainPacking(), InOutPacking())
    )
    for key, tensors in turned.items():
        want = in_out(plain[key], models)
        assert tensors.keys() == want.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, want[name]), name
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size == weight_bytes(models, "target", InOutPacking()) == weight_bytes(models, "target", PlainPacking())
    names = {name.split(".")[-2] for name, tensor in turned["target", 0].items() if tensor.dim() == 2}
    assert names.isdisjoint(part for parts in FUSED.values() for part in parts)
    assert {*FUSED, "o_proj", "down_proj"} <= names


def test_write_shards_says_its_packing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    shards = write_shards(pair_of(target, target), target, target, tmp_path / "out", packing=InOutPacking())
    with safe_open(shards[0].path, "pt") as file:
        assert file.metadata()["packing"] == "in-out"
        assert file.get_slice(HEAD).get_shape() == [32, 96]


def test_stored_weights_of_a_head_over_states_are_fused() -> None:
    """The first layer of an EAGLE-3 head reads twice the hidden size."""
    target = config_of(CONFIG, "target")
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16, "num_hidden_layers": 1}
    draft = config_of(CONFIG | fields, "draft")
    models = ModelsSpec(target, draft, "float32", "float32", 1, draft_replicated=True)
    found = {spec.name: spec for spec in stored_weights(models, "draft", fused=True)}
    assert found["model.layers.0.self_attn.qkv_proj.weight"].shape == ((4 + 2 + 2) * 16, 64)
    assert found["fc.weight"].shape == (32, 3 * 32)


@pytest.mark.parametrize("files", [1, 3])
def test_shard_of_a_stopped_build_is_continued(tmp_path: Path, files: int) -> None:
    """A matrix that was written in part is read again whole; what is written is not."""
    write_checkpoint(tmp_path / "m", files=files, intermediate_size=6000)
    target = opened(tmp_path / "m", tmp_path)
    draft, seen = derive(target, (0,)), []
    models = pair_of(target, draft, tp=2)

    def cut(path: Path) -> None:
        for number, file in enumerate(sorted(path.rglob("*.safetensors"))):
            with file.open("r+b") as open_file:
                open_file.truncate((file.stat().st_size * (2 + number) // 8) // 4096 * 4096)

    whole = write_shards(models, target, draft, tmp_path / "out", packing=InOutPacking())
    digests = [file.sha256 for file in whole]
    cut(tmp_path / "out")
    again = write_shards(
        models, target, draft, tmp_path / "out", packing=InOutPacking(), progress=lambda *now: seen.append(now)
    )
    assert [file.sha256 for file in again] == digests
    assert seen[0][0] > 0


SPLIT = {
    "model.layers.0.self_attn.k_proj.weight": 2, "model.layers.0.self_attn.v_proj.weight": 2,
    "model.layers.1.mlp.up_proj.weight": 3,
    **{f"model.layers.1.self_attn.{name}_proj.weight": 3 for name in "qkvo"}, "lm_head.weight": 2,
}  # fmt: skip
"""The file of tensors that are not in the first one: a file ends inside of `qkv_proj` and of `gate_up_proj`."""


def stored(folder: Path, split: dict[str, int]) -> dict[str, bytes]:
    """The files of a checkpoint that is cut into three; each begins with a tensor that is larger than a header."""
    sizes = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 6000}
    weights = write_checkpoint(folder, **sizes)
    table = {name: f"model-{split.get(name, 1):05}-of-00003.safetensors" for name in sorted(weights)}
    (folder / "model.safetensors").unlink()
    for file in sorted({*table.values()}):
        save_file({name: one for name, one in weights.items() if table[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("split", "most_open", "is_once"),
    [(SPLIT, None, True), ({}, None, True), (SPLIT, 0, False), ({}, 0, False)],
    ids=["cut inside of matrices", "one file", "cut, none waits", "one file, none waits"],
)
def test_bytes_that_a_store_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, int], most_open: int | None, is_once: bool
) -> None:
    """Keys stand before queries in a file, and parts of a matrix in two files: each byte is fetched once nevertheless.

    Were no matrix to wait for its parts, some were fetched again: the shards would be the same.
    """
    if most_open is not None:
        monkeypatch.setattr(shard_files, "MOST_OPEN", most_open)
    files = stored(tmp_path / "m", split)
    here = opened(tmp_path / "m", tmp_path)
    with running_s3() as bucket:
        for name, value in (("ENDPOINT_URL", bucket.endpoint), ("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "s"),
                            ("REGION", "us-east-1")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        bucket.objects |= {f"models/m/{name}": data for name, data in files.items()}
        target = opened("s3://bucket/models/m", tmp_path)  # type: ignore[arg-type]
        models = pair_of(target, here, tp=4, dtype="bfloat16", replicated=False)
        shards = write_shards(models, target, here, tmp_path / "out", packing=InOutPacking())
    sent: Counter[str] = Counter()
    for key, _, count in bucket.ranges:
        sent[key.rpartition("/")[2]] += count
    weights = {name: len(data) for name, data in files.items() if name.endswith(".safetensors")}
    assert ({name: sent[name] for name in weights} == weights) is is_once
    assert all(sent[name] >= size for name, size in weights.items())
    again = write_shards(models, here, here, tmp_path / "local", packing=InOutPacking())
    assert [file.sha256 for file in shards] == [file.sha256 for file in again]


def test_shard_of_another_packing_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    models = pair_of(target, target)
    roots = {
        shard(models, (target, target), packing, tmp_path / "cache", lambda _: None, lambda *_: None).root
        for packing in (PlainPacking(), InOutPacking())
    }
    assert len(roots) == 2
