"""Reference logits from transformers, computed once per content: model files, tokens, dtype, transformers version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.files import atomic_dir
from pipeline.sources import Checkpoint, weights
from pipeline.trace import DTYPES

EMBEDDING = "model.embed_tokens.weight"


class Reference:
    """A model in transformers: its logits for whole sequences, in float32, from the cache where they are known."""

    def __init__(self, checkpoint: Checkpoint, target: Checkpoint, dtype: str, attention: str, cache: Path) -> None:
        self._checkpoint, self._target = checkpoint, target
        self._dtype, self._attention, self._cache = dtype, attention, cache
        self._model: Any = None

    def logits(self, tokens: list[int]) -> Tensor:
        """Teacher-forced logits, float32 [T, V]."""
        path = self._cache / self._key(tokens)
        if (path / "logits.safetensors").is_file():
            return load_file(path / "logits.safetensors")["logits"]
        if self._model is None:
            self._model = build_model(self._checkpoint, self._target, self._dtype, self._attention)
        with torch.no_grad():
            found: Tensor = self._model(torch.tensor([tokens])).logits[0].float()
        with atomic_dir(path) as folder:
            save_file({"logits": found}, folder / "logits.safetensors")
        return found

    def _key(self, tokens: list[int]) -> str:
        files = sorted((n, d.sha256) for c in (self._checkpoint, self._target) for n, d in c.files.items())
        facts = [files, self._checkpoint.layers, tokens, self._dtype, self._attention, transformers.__version__]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def build_model(checkpoint: Checkpoint, target: Checkpoint, dtype: str, attention: str) -> Any:
    """The checkpoint as a transformers model. A draft that shares its target's embedding, or has a reduced vocabulary,
    is put together from both.
    """  # fmt: skip
    kind = DTYPES[dtype]
    whole = (
        checkpoint.layers is None and not checkpoint.config.shares_embedding and checkpoint.config.draft_vocab is None
    )
    if whole:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.root, dtype=kind, attn_implementation=attention
        )
        return model.eval()
    fields = {k: v for k, v in checkpoint.config_json.items() if k not in ("model_type", "layer_types")}
    fields["num_hidden_layers"] = checkpoint.config.layers
    config = transformers.AutoConfig.for_model(checkpoint.config_json["model_type"], **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=attention)
    if checkpoint.config.draft_vocab is not None:
        model.lm_head = torch.nn.Linear(checkpoint.config.hidden, checkpoint.config.draft_vocab, bias=False, dtype=kind)
    state = {name: tensor.to(kind) for name, tensor in _tensors(checkpoint) if name != "d2t"}
    if checkpoint.config.shares_embedding:
        state[EMBEDDING] = dict(_tensors(target, EMBEDDING))[EMBEDDING].to(kind)
    if checkpoint.config.tied:
        state["lm_head.weight"] = state[EMBEDDING]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _tensors(checkpoint: Checkpoint, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
    for name, ref in weights(checkpoint).items():
        if only is None or name == only:
            with ref.file.open("rb") as file:
                file.seek(ref.offset)
                data = bytearray(file.read(ref.nbytes))
            yield name, torch.frombuffer(data, dtype=kinds[ref.dtype]).view(ref.shape)
