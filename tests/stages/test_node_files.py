"""Sources and artifacts on a node: from the shared cache, or read where they are stored."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import pytest
import torch

from pipeline.cache.collect import SENT, remove_unused
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.errors import SourceError
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.stages.node_files import received_pair, send_pair
from support.checkpoints import write_checkpoint
from support.hub_server import Repo
from support.hub_server import running as running_hub
from support.range_s3 import running as running_s3


@pytest.fixture
def remote(tmp_path):
    return Remote(str(tmp_path / "shared"), "write")


@pytest.fixture
def model(tmp_path):
    """The files of a checkpoint, by name."""
    write_checkpoint(tmp_path / "m", files=2)
    return {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}


def recipe_of(source: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "sent",
            "target": {"source": source, "dtype": "float32"},
            "draft": {"derive": {"from": "target", "layers": [1]}},
            "speculation": {"draft_tokens": [1]},
            "shapes": {"batch": [1], "prefill": [16], "kv": [48]},
        }
    )


def sent_and_received(remote, recipe, tmp_path, change=lambda: None):
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")
    sent = pickle.loads(pickle.dumps(send_pair(remote, pair, recipe, tmp_path, no_log)))
    change()
    return pair, received_pair(remote, sent, tmp_path / "node")


def assert_equal(pair, received):
    for here, there in zip(pair, received, strict=True):
        assert there == replace(here, root=there.root, remote=there.remote)
        expected, found = dict(weights(here)), dict(weights(there))
        assert expected.keys() == found.keys()
        assert all(torch.equal(read_tensor(ref), read_tensor(found[name])) for name, ref in expected.items())


def test_pair_of_a_folder_is_sent_whole_and_once(remote, model, tmp_path):
    pair, received = sent_and_received(remote, recipe_of("m"), tmp_path)
    assert_equal(pair, received)
    assert received[0].root == received[1].root
    assert received[0].root.is_relative_to(tmp_path / "node")
    assert remote.open("files").stats().entries == len(pair[0].files)


def test_weights_in_s3_are_not_sent(remote, model, tmp_path, monkeypatch):
    with running_s3() as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        bucket.objects |= {f"models/m/{name}": data for name, data in model.items()}
        pair, received = sent_and_received(remote, recipe_of("s3://bucket/models/m"), tmp_path)
        assert_equal(pair, received)
        assert not list((tmp_path / "node").rglob("*.safetensors"))

        def replaced():
            name = next(name for name in model if name.endswith(".safetensors"))
            bucket.objects[f"models/m/{name}"] = bytes(reversed(model[name]))

        with pytest.raises(SourceError, match="the source has changed"):
            sent_and_received(remote, recipe_of("s3://bucket/models/m"), tmp_path, replaced)


def test_weights_on_the_hub_are_streamed_by_a_node_as_by_the_build(remote, model, tmp_path, monkeypatch):
    """A node without TANDEM_STREAM downloaded the whole checkpoint."""
    with running_hub() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
        monkeypatch.setenv("TANDEM_STREAM", "1")
        state.repos["org/m"] = Repo(dict(model))
        pair, received = sent_and_received(
            remote, recipe_of("hf://org/m"), tmp_path, lambda: monkeypatch.delenv("TANDEM_STREAM")
        )
        assert_equal(pair, received)
    assert not list((tmp_path / "node").rglob("*.safetensors"))


def test_gc_removes_what_was_sent_and_not_used_since(remote, model, tmp_path):
    _, received = sent_and_received(remote, recipe_of("m"), tmp_path)
    remove_unused(tmp_path / "node", 0)
    assert received[0].root.is_dir()
    os.utime(received[0].root, (1, 1))
    remove_unused(tmp_path / "node", 0)
    assert not list((tmp_path / "node" / SENT).iterdir())
    assert Cache(tmp_path / "node", "files").stats().entries == len(model)
