"""Read values of a checkpoint's tensors. Needs torch, which the rest of this room does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.models.weights import D2T, OF_EXPERTS, WeightSpec
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.dequantise import dequantised
from pipeline.sources.packed import Cut, PackedRef, Source, placed
from pipeline.sources.tensors import read_bytes
from pipeline.sources.weights import weights


def read_tensor(ref: Source) -> Tensor:
    """Read one tensor of a checkpoint; a quantised one as float32."""
    if isinstance(ref, PackedRef):
        return dequantised(ref, _cuts(ref))
    return torch.frombuffer(read_bytes(ref), dtype=SAFETENSORS[ref.dtype].as_torch()).view(ref.shape)


def _cuts(ref: PackedRef) -> Tensor:
    """Return the bytes of a quantised tensor's cuts, where `placed` puts them."""
    data = torch.empty(ref.read_bytes, dtype=torch.uint8)
    for at, cut in placed(ref.cuts):
        data[at : at + cut.nbytes] = _bytes(cut)
    return data


def _bytes(cut: Cut) -> Tensor:
    if cut.contiguous:
        return torch.frombuffer(read_bytes(cut.whole), dtype=torch.uint8)
    pieces = torch.frombuffer(read_bytes(cut.ref), dtype=torch.uint8).view(cut.count, cut.stride)
    return pieces[:, cut.start : cut.start + cut.width].flatten()


def read_weight(refs: Mapping[str, Source], spec: WeightSpec) -> Tensor:
    """Read a weight of a model: the matrices or biases of experts as one tensor."""
    tensors = [read_tensor(refs[part.name]) for part in spec.parts]
    return torch.stack(tensors) if spec.kind in OF_EXPERTS else tensors[0]


def draft_token_ids(draft: Checkpoint) -> Tensor | None:
    """Return the target's id of each token of a draft's reduced vocabulary; None where the vocabularies are equal."""
    if draft.config.draft_vocab is None:
        return None
    return torch.arange(draft.config.draft_vocab) + read_tensor(weights(draft)[D2T]).long()
