"""Small random checkpoints for tests, written by safetensors itself, so that our own reader and writer are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import SourceError
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
INDEX = "model.safetensors.index.json"


def random_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that a config needs, by name."""
    generator = torch.Generator().manual_seed(seed)
    specs = weight_specs(config_of(config, "test"))
    found = {s.name: torch.randn(s.shape, generator=generator).to(dtype) for s in specs if s.kind != "index"}
    if "draft_vocab_size" in config:
        found[D2T] = torch.arange(config["draft_vocab_size"])  # draft id i is target id 2 i
    return found


def write_checkpoint(
    root: Path, weights: dict[str, Tensor] | None = None, *, files: int = 1, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Write a folder in Hugging Face layout; returns its tensors. `changes` are config keys."""
    config = CONFIG | changes
    weights = random_weights(config, dtype) if weights is None else weights
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(weights, root / "model.safetensors", {"format": "pt"})
        return weights
    names = sorted(weights)
    table = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(table.values())):
        save_file({name: weights[name] for name in names if table[name] == file}, root / file, {"format": "pt"})
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return weights


def opened(source: str, tmp_path: Path, **kwargs: Any) -> Checkpoint:
    """Open a source, with folders in and caches below `tmp_path`."""
    return resolve(source, base=tmp_path, cache=tmp_path / "cache", **kwargs)


def refusal(source: str, tmp_path: Path, **kwargs: Any) -> str:
    """Return the message that opening a source ends with."""
    with pytest.raises(SourceError) as caught:
        opened(source, tmp_path, **kwargs)
    return str(caught.value)
