"""Drafts and their targets: shared embeddings, reduced vocabularies, derived layers, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import SourceError
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.sources.derived import derive
from pipeline.sources.pair import check_pair, resolve_pair
from pipeline.sources.tokenizer import check_tokenizers
from pipeline.sources.weights import weights
from support.checkpoints import CONFIG, opened, random_weights, refusal, write_checkpoint


def draft_config(**changes: Any) -> dict[str, Any]:
    return CONFIG | {"draft_vocab_size": 33} | changes


def write_draft(root: Path, **changes: Any) -> None:
    """A draft with a reduced vocabulary that shares its target's embedding."""
    config = draft_config(**changes)
    tensors = random_weights(config)
    del tensors[EMBEDDING]
    write_checkpoint(root, tensors, **config)


def test_resolve_draft_without_embedding_shares_it(tmp_path: Path) -> None:
    write_draft(tmp_path / "d")
    draft = opened("d", tmp_path, role="draft")
    assert draft.config.shares_embedding
    assert draft.config.draft_vocab == 33
    assert draft.tokenizer_files == ()
    assert "it uses the embedding or the vocabulary of a target" in refusal("d", tmp_path)


def test_resolve_target_without_embedding_is_refused(tmp_path: Path) -> None:
    tensors = random_weights(CONFIG)
    del tensors[EMBEDDING]
    write_checkpoint(tmp_path / "m", tensors)
    assert f"missing weight {EMBEDDING}" in refusal("m", tmp_path)


@pytest.mark.parametrize(
    ("d2t", "said"),
    [(torch.full((33,), 60), "d2t[10]=60 maps to token 70, outside 0..69"), (-torch.arange(33), "onto 1 target ids")],
)
def test_resolve_draft_ids_must_land_on_target_ids_of_their_own(tmp_path: Path, d2t: torch.Tensor, said: str) -> None:
    tensors = random_weights(draft_config())
    write_checkpoint(tmp_path / "d", tensors | {D2T: d2t}, draft_vocab_size=33)
    assert said in refusal("d", tmp_path, role="draft")


def test_derive_renumbers_the_targets_own_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2, num_hidden_layers=3)
    target = opened("m", tmp_path)
    draft = derive(target, (2, 0))
    found, whole = weights(draft), weights(target)
    assert draft.config.layers == draft.config_json["num_hidden_layers"] == 2
    assert draft.config.shares_embedding
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert found[name.format(0)] == whole[name.format(2)]
    assert found[name.format(1)] == whole[name.format(0)]
    assert found[HEAD] == whole[HEAD]
    assert name.format(2) not in found
    assert draft.revision != derive(target, (0, 2)).revision != target.revision


@pytest.mark.parametrize(("layers", "said"), [((0, 2), "no layer 2"), ((-1,), "no layer -1"), ((), "no layers")])
def test_derive_layer_that_is_not_there_is_refused(tmp_path: Path, layers: tuple[int, ...], said: str) -> None:
    write_checkpoint(tmp_path / "m")
    with pytest.raises(SourceError, match=said):
        derive(opened("m", tmp_path), layers)


def test_check_pair_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    write_draft(tmp_path / "d", hidden_size=64)
    write_draft(tmp_path / "v", vocab_size=71)
    target = opened("m", tmp_path)
    with pytest.raises(SourceError, match="hidden_size=64, but the target has 32"):
        check_pair(target, opened("d", tmp_path, role="draft"))
    with pytest.raises(SourceError, match="vocab_size=71, but the target has 70"):
        check_pair(target, opened("v", tmp_path, role="draft"))


def recipe(draft: dict[str, Any], target: str = "pico://llama") -> Recipe:
    data = {
        "name": "test",
        "target": {"source": target},
        "draft": draft,
        "speculation": {"draft_tokens": (2,)},
        "shapes": {"batch": (1,), "prefill": (16,), "kv": (64,)},
    }
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    "draft", [{"derive": {"from": "target", "layers": (0,)}}, {"source": "pico://llama?draft_vocab=128"}]
)
def test_resolve_pair(tmp_path: Path, draft: dict[str, Any]) -> None:
    target, found = resolve_pair(recipe(draft), base=tmp_path, cache=tmp_path / "cache")
    assert (target.config.layers, found.config.layers) == (3, 1)
    assert found.config.shares_embedding


def with_tokenizer(root: Path, tmp_path: Path, **changes: Any) -> Checkpoint:
    """A tiny model whose tokenizer.json has `changes` merged in."""
    source = opened("pico://llama", tmp_path)
    root.mkdir()
    for path in source.root.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    tokenizer["model"] |= changes.pop("model", {})
    (root / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    return opened(str(root), tmp_path, role="draft")


def test_a_folder_whose_name_is_not_utf8_is_opened(tmp_path: Path) -> None:
    """The name of the memo of digests ended in a UnicodeEncodeError."""
    root = tmp_path / "caf\udce9"
    write_checkpoint(root)
    first = open_checkpoint(root, memo=tmp_path / "memo")
    assert open_checkpoint(root, memo=tmp_path / "memo").revision == first.revision


def test_check_tokenizers_same_content_in_another_notation_passes(tmp_path: Path) -> None:
    target = opened("pico://llama", tmp_path)
    merges = json.loads((target.root / "tokenizer.json").read_text())["model"]["merges"]
    check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, model={"merges": [" ".join(m) for m in merges]}))


def test_check_tokenizers_differing_ids_are_named(tmp_path: Path) -> None:
    target = opened("pico://llama", tmp_path)
    vocab = json.loads((target.root / "tokenizer.json").read_text())["model"]["vocab"]
    first, second = (token for token, i in vocab.items() if i in (100, 101))
    swapped = vocab | {first: vocab[second], second: vocab[first]}
    with pytest.raises(SourceError) as caught:
        check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, model={"vocab": swapped}))
    assert "512 tokens against 512, 2 ids differ (id 100:" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"merges": [["a", "b"]]}}, "merges against 1, the first difference at 0"),
        ({"normalizer": {"type": "NFC"}}, 'normalizer null against {"type": "NFC"}'),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"added_tokens": [{"id": 512, "content": "<new>"}]}, "512 tokens against 513, 1 ids differ (id 512: None"),
    ],
)
def test_check_tokenizers_says_how_they_differ(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    target = opened("pico://llama", tmp_path)
    with pytest.raises(SourceError) as caught:
        check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, **changes))
    assert said in str(caught.value)
