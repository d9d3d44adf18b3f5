"""Weights of a rank as they are mapped."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.graphs.shards import read_shard


def test_read_shard_returns_every_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5), "b": torch.randn(3, 4).bfloat16()}
    save_file(tensors, tmp_path / "rank-0-of-1.safetensors")
    found = read_shard(tmp_path / "rank-0-of-1.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
