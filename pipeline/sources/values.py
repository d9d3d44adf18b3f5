"""Read values of a checkpoint's tensors. Needs torch, which the rest of this room does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.models.weights import D2T, WeightSpec
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.tensors import TensorRef, read_bytes
from pipeline.sources.weights import weights


def read_tensor(ref: TensorRef) -> Tensor:
    """Read one tensor of a checkpoint."""
    return torch.frombuffer(read_bytes(ref), dtype=SAFETENSORS[ref.dtype].as_torch()).view(ref.shape)


def read_weight(refs: Mapping[str, TensorRef], spec: WeightSpec) -> Tensor:
    """Read a weight of a model: the matrices of experts as one tensor."""
    tensors = [read_tensor(refs[part.name]) for part in spec.parts]
    return torch.stack(tensors) if spec.kind == "experts" else tensors[0]


def draft_token_ids(draft: Checkpoint) -> Tensor | None:
    """Return the target's id of each token of a draft's reduced vocabulary; None where the vocabularies are equal."""
    if draft.config.draft_vocab is None:
        return None
    return torch.arange(draft.config.draft_vocab) + read_tensor(weights(draft)[D2T]).long()
