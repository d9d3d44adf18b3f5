"""Weights as folders really hold them: a stale index, git-LFS pointers, weights of AutoModel, rotary buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pipeline.errors import SourceError
from pipeline.models.weights import EMBEDDING, HEAD, NORM
from pipeline.recipe import load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.hub import Hub
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.checks import resolved, usable_backend
from pipeline.stages.settings import BuildSettings
from support import families
from support.checkpoints import CONFIG, INDEX, random_weights, write_checkpoint
from support.hub_server import Repo, running

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 1234567\n"


def opened(root: Path, **kwargs: Any) -> Checkpoint:
    return resolve(str(root), base=root, cache=root.parent / "cache", **kwargs)


def refusal(root: Path) -> SourceError:
    with pytest.raises(SourceError) as raised:
        opened(root)
    return raised.value


def as_transformers_loads(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model that transformers makes of a folder."""
    return dict(transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).state_dict())


def assert_same_tensors(root: Path, tied: bool = False) -> None:
    ours = {name: read_tensor(ref) for name, ref in weights(opened(root)).items() if "rotary_emb" not in name}
    theirs = as_transformers_loads(root)
    if tied:
        ours.setdefault(HEAD, ours[EMBEDDING])
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def with_both_layouts(root: Path) -> None:
    """`model.safetensors` of one model beside the index and shards of another."""
    write_checkpoint(root, random_weights(CONFIG, seed=1), files=2)
    save_file(random_weights(CONFIG, seed=2), root / "model.safetensors", {"format": "pt"})


def test_index_beside_model_safetensors_is_ignored(tmp_path):
    """Was: the index won, where transformers reads model.safetensors."""
    with_both_layouts(tmp_path / "m")
    assert_same_tensors(tmp_path / "m")
    assert INDEX not in opened(tmp_path / "m").files


def test_index_of_missing_shards_beside_model_safetensors_is_ignored(tmp_path):
    """Was: "weight file is missing" for a folder that transformers reads."""
    with_both_layouts(tmp_path / "m")
    for shard in (tmp_path / "m").glob("model-*.safetensors"):
        shard.unlink()
    assert_same_tensors(tmp_path / "m")


def test_hub_index_beside_model_safetensors_is_not_downloaded(tmp_path):
    """Was: the shards of the index were downloaded and read."""
    with_both_layouts(tmp_path / "repo")
    with running() as hub:
        hub.repos["org/model"] = Repo({path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()})
        fetched = Hub(endpoint=hub.endpoint, cache_dir=tmp_path / "hub").fetch("org/model", tmp_path / "n", _quiet)
    assert {path.name for path in fetched.root.iterdir()} == {"config.json", "model.safetensors"}


def _quiet(*_: Any) -> None:
    pass


def test_build_says_which_weights_are_read(tmp_path):
    """Of two layouts that differ, one wins silently otherwise."""
    with_both_layouts(tmp_path / "m")
    families.write_tokenizer(tmp_path / "m", "json")
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ntarget: {source: ./m}\ndraft: {derive: {from: target, layers: [0]}}\n"
        "speculation: {draft_tokens: [1]}\nshapes: {batch: [1], prefill: [16], kv: [32]}\n"
    )
    lines: list[str] = []
    settings = BuildSettings(
        load(tmp_path / "tiny.yaml"), tmp_path, tmp_path / "out", cache=tmp_path / "cache", log=lines.append
    )
    resolved(settings, usable_backend(settings.recipe))
    (line,) = lines
    assert line.startswith(f"warning: {tmp_path / 'm'}: model.safetensors is read, as in transformers; {INDEX} and ")


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", INDEX, SHARD])
def test_git_lfs_pointer_is_named(tmp_path, name):
    """Was: "header of 2336927755350992246 bytes", "not JSON" and other riddles."""
    write_checkpoint(tmp_path / "m", files=2 if name in (INDEX, SHARD) else 1)
    (tmp_path / "m" / name).write_bytes(POINTER)
    error = refusal(tmp_path / "m")
    assert error.what == f"git-LFS pointer instead of the file: {name}"
    assert "git lfs pull" in error.fix


def test_adapter_beside_weights_is_refused(tmp_path):
    """Was: ignored; transformers merges the adapter into the model."""
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    error = refusal(tmp_path / "m")
    assert error.what == "adapters are not supported"
    assert "merge_and_unload" in error.fix


def base_model(root: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a checkpoint as AutoModel saves it; returns its tensors without a prefix."""
    tensors = random_weights(CONFIG | changes)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write_checkpoint(root, bare, **changes)
    return bare


def test_weights_of_automodel_are_read_without_prefix(tmp_path):
    """Was: 20 lines of missing and extra weights. transformers adds `base_model_prefix`."""
    base_model(tmp_path / "m", tie_word_embeddings=True)
    assert_same_tensors(tmp_path / "m", tied=True)


def test_weights_of_automodel_without_a_head_name_the_remedy(tmp_path):
    """transformers would make a random head."""
    bare = base_model(tmp_path / "m")
    del bare[HEAD]
    write_checkpoint(tmp_path / "m", bare)
    error = refusal(tmp_path / "m")
    assert error.what == "missing weight lm_head.weight [70, 32]"
    assert "AutoModelForCausalLM" in error.fix


def test_weights_under_both_names_are_refused(tmp_path):
    tensors = random_weights(CONFIG)
    write_checkpoint(tmp_path / "m", tensors | {"norm.weight": tensors[NORM] + 1})
    assert refusal(tmp_path / "m").what == "extra weight norm.weight [32] in model.safetensors"


def test_weights_under_another_prefix_name_the_prefix(tmp_path):
    """Was: 20 lines without a hint."""
    write_checkpoint(tmp_path / "m", {f"module.{name}": tensor for name, tensor in random_weights(CONFIG).items()})
    assert refusal(tmp_path / "m").fix == "remove the prefix 'module.' from the names of the tensors"


@pytest.mark.parametrize(
    "name",
    [
        "rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
    ],
)
def test_rotary_buffers_under_every_name_are_ignored(tmp_path, name):
    """Was: a bare name was an extra weight. Values in the file never matter, as in transformers."""
    write_checkpoint(tmp_path / "m", random_weights(CONFIG) | {name: torch.full((8,), 7.0)})
    assert_same_tensors(tmp_path / "m")


@pytest.mark.parametrize("present", [False, True])
def test_tied_head_may_be_present(tmp_path, present):
    tensors = random_weights(CONFIG | {"tie_word_embeddings": True})
    head = {HEAD: tensors[EMBEDDING].clone()} if present else {}
    write_checkpoint(tmp_path / "m", tensors | head, tie_word_embeddings=True)
    assert_same_tensors(tmp_path / "m", tied=True)


def test_tied_head_that_differs_names_both_remedies(tmp_path):
    """transformers 5 uses the head, 4.57 and vLLM the embedding."""
    tensors = random_weights(CONFIG | {"tie_word_embeddings": True})
    write_checkpoint(tmp_path / "m", tensors | {HEAD: tensors[EMBEDDING] + 1}, tie_word_embeddings=True)
    error = refusal(tmp_path / "m")
    assert "set tie_word_embeddings to false" in error.fix
    assert "remove lm_head" in error.fix


def test_old_tensor_parallel_setting_is_accepted(tmp_path):
    """Was: `pretraining_tp` of 2 was refused; it only splits products, and transformers ignores it."""
    write_checkpoint(tmp_path / "m", pretraining_tp=2)
    assert_same_tensors(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["pretraining_tp"] == 2
