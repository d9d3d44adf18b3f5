"""Shards of the Neuron backend: matrices [in, out], those of one input as one, against transposed plain shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.graphs.packing import InOutPacking, PlainPacking
from pipeline.graphs.signature import stored_weights
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.families import config_of
from pipeline.models.weights import FUSED, HEAD
from pipeline.plan.estimates import weight_bytes
from pipeline.sources.derived import derive
from pipeline.stages import windows
from pipeline.stages.shard import shard
from pipeline.stages.shard_files import ShardFile, write_shards
from support.checkpoints import CONFIG, write_checkpoint
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


def test_shard_of_a_stopped_build_is_continued(tmp_path: Path) -> None:
    """A matrix that was written in part is read again whole; what is written is not."""
    write_checkpoint(tmp_path / "m", intermediate_size=6000)
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


def test_write_shards_from_a_store_equal_those_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys stand before queries in a file, so those alone are fetched twice."""
    write_checkpoint(tmp_path / "m", files=2, vocab_size=3000)
    here = opened(tmp_path / "m", tmp_path)
    with running_s3() as bucket:
        for name, value in (("ENDPOINT_URL", bucket.endpoint), ("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "s"),
                            ("REGION", "us-east-1")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        bucket.objects |= {f"models/m/{path.name}": path.read_bytes() for path in (tmp_path / "m").iterdir()}
        target = opened("s3://bucket/models/m", tmp_path)  # type: ignore[arg-type]
        models = pair_of(target, here, tp=4, dtype="bfloat16", replicated=False)
        shards = write_shards(models, target, here, tmp_path / "out", packing=InOutPacking())
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
