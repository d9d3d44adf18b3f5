"""A few rows times a blocked weight, as an operator: what decoding and verifying spend their time on.

Here is what it computes; `block_linear_kernel.py` is what Inductor compiles it to, so that a compiled graph carries its
kernel and needs nothing of this package.

Shapes: M rows, I input features, N output features (whole blocks of 32). An int8 block is [I + 4, 32]: its last
rows are the bytes of its scales.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("tandem::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of a blocked weight, summed in float32.

    Shapes: x float32 [M, I] contiguous, weight [N/32, I, 32] float32, bfloat16 or float16, or int8 [N/32, I + 4, 32] ->
    float32 [M, N].
    """
    if weight.dtype == torch.int8:
        inputs = x.shape[1]
        scales = weight[:, inputs:].reshape(weight.shape[0], -1).view(torch.float32)
        blocks = torch.matmul(x[None], weight[:, :inputs].float()) * scales[:, None]
    else:
        blocks = torch.matmul(x[None], weight.float())
    return blocks.permute(1, 0, 2).reshape(x.shape[0], -1)


@block_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])
