"""A few rows times a blocked weight, as an operator: what decoding and verifying spend their time on.

Here is what it computes; `block_linear_kernel.py` is what Inductor compiles it to, so that a compiled graph carries its
kernel and needs nothing of this package.

Shapes: M rows, I input features, N output features (whole blocks of 32); blocks as `BlockPacking` lays them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.weights import BLOCK


@torch.library.custom_op("tandem::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of a blocked weight, summed in float32.

    Shapes: x [M, I] of the model's dtype, contiguous; weight [N/32, I, 32], or [N/32, I/2, 32, 2], of it or int8, whose
    scales follow -> float32 [M, N].
    """
    count, inputs = len(weight), x.shape[1]
    flat = weight.reshape(count, -1)
    blocks = flat[:, : inputs * BLOCK].float()
    paired = weight.dim() == 4
    blocks = blocks.view(count, -1, BLOCK, 2).transpose(2, 3) if paired else blocks
    blocks = torch.matmul(x.float()[None], blocks.reshape(count, inputs, BLOCK))
    if weight.dtype == torch.int8:
        blocks = blocks * flat[:, inputs * BLOCK :].contiguous().view(torch.float32)[:, None]
    return blocks.permute(1, 0, 2).reshape(x.shape[0], -1)


@block_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2], dtype=torch.float32)
