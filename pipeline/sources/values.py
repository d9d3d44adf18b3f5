"""Read values of a checkpoint's tensors. Needs torch, which the rest of this room does not."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.models.weights import D2T
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.tensors import TensorRef, read_bytes
from pipeline.sources.weights import weights


def read_tensor(ref: TensorRef) -> Tensor:
    """Read one tensor of a checkpoint."""
    return torch.frombuffer(read_bytes(ref), dtype=SAFETENSORS[ref.dtype].as_torch()).view(ref.shape)


def draft_token_ids(draft: Checkpoint) -> Tensor | None:
    """Return the target's id of each token of a draft's reduced vocabulary; None where the vocabularies are equal."""
    if draft.config.draft_vocab is None:
        return None
    return torch.arange(draft.config.draft_vocab) + read_tensor(weights(draft)[D2T]).long()
