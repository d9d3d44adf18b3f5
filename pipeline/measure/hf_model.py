"""A checkpoint as a transformers model, to measure against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.weights import weights
from pipeline.validate.reference.goldens import read_tensor


def build_model(checkpoint: Checkpoint, target: Checkpoint, dtype: str, attention: str) -> Any:
    """The checkpoint as a transformers model. A draft that shares its target's embedding, or has a reduced vocabulary,
    is put together from both.
    """  # fmt: skip
    kind = torch_dtype(dtype)
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
    state = {name: tensor.to(kind) for name, tensor in _tensors(checkpoint) if name != D2T}
    if checkpoint.config.shares_embedding:
        state[EMBEDDING] = dict(_tensors(target, EMBEDDING))[EMBEDDING].to(kind)
    if checkpoint.config.tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _tensors(checkpoint: Checkpoint, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    for name, ref in weights(checkpoint).items():
        if only is None or name == only:
            yield name, read_tensor(ref)
