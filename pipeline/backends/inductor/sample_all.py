"""Sampling from a whole vocabulary as one operator, which hashes only the tokens that can win.

This module defines the result; Inductor compiles it from `sample_all_kernel.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.speculation import sampling


@torch.library.custom_op("tandem::sample_all", mutates_args=())
def sample_all(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor, names: Tensor
) -> Tensor:
    """Return a token for each row, int64 [M]; see `pipeline.speculation.sampling.sample_all`.

    Shapes: logits float32 [M, V], temperature, top_p float32 [M], top_k, position int32 [M], seed int32 [M, 2], names
    int32 [V]. All contiguous.
    """
    return sampling.sample_all(logits, sampling.Drawn(temperature, top_k, top_p, seed, position, names))


@sample_all.register_fake
def _(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor,  # noqa: ARG001
    names: Tensor,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
