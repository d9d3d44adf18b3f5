"""Products of a few rows with blocked weights, as operators: most of the time of decode and speculate steps.

This module defines their results; Inductor compiles them from `block_linear_kernel.py`, so that a compiled graph
contains its kernels and does not need this package.

Shapes: M rows, I input features, N output features (whole blocks of 32); blocks as `BlockPacking` lays them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.graphs.packing import unpacked_int4
from pipeline.models.int4 import dequantised
from pipeline.models.weights import BLOCK


@torch.library.custom_op("tandem::block_linear", mutates_args=())
def block_linear(x: Tensor, weights: Sequence[Tensor], live: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T` of blocked weights of one dtype, summed in float32 and concatenated.

    Rows that are not `live` cost nothing; their results are zeros.

    Shapes: x [M, I] of the model's dtype, contiguous; weights [N/32, I, 32], or [N/32, I/2, 32, 2], of the same dtype
    or int8 followed by its scales; or, of 4 bits, [N/32, I/32, 32, 18]; live bool [M] -> float32 [M, sum of N].
    """
    return _of_live(torch.cat([_product(x, weight) for weight in weights], dim=-1), live)


@block_linear.register_fake
def _(x: Tensor, weights: Sequence[Tensor], live: Tensor | None = None) -> Tensor:  # noqa: ARG001 - as above
    return x.new_empty(x.shape[0], sum(_outputs(weight) for weight in weights), dtype=torch.float32)


@torch.library.custom_op("tandem::block_swiglu", mutates_args=())
def block_swiglu(x: Tensor, gate: Tensor, up: Tensor, live: Tensor | None = None) -> Tensor:
    """Compute `silu(x @ gate.T) * (x @ up.T)` (Shazeer 2020) of blocked weights in float32, rounded once at the end.

    Shapes: x, gate, up, live as of `block_linear` -> x's dtype [M, N].
    """
    return _of_live((functional.silu(_product(x, gate)) * _product(x, up)).to(x.dtype), live)


@block_swiglu.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, live: Tensor | None = None) -> Tensor:  # noqa: ARG001 - the operator's signature
    return x.new_empty(x.shape[0], _outputs(gate))


def _of_live(out: Tensor, live: Tensor | None) -> Tensor:
    return out if live is None else torch.where(live[:, None], out, 0)


def _outputs(weight: Tensor) -> int:
    return weight.shape[0] * weight.shape[2]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the product with one weight, float32 [M, N]."""
    count, inputs = len(weight), x.shape[1]
    if weight.dtype == torch.uint8:
        return functional.linear(x.float(), dequantised(*unpacked_int4(weight)))
    flat = weight.reshape(count, -1)
    blocks = flat[:, : inputs * BLOCK].float()
    paired = weight.dim() == 4
    blocks = blocks.view(count, -1, BLOCK, 2).transpose(2, 3) if paired else blocks
    blocks = torch.matmul(x.float()[None], blocks.reshape(count, inputs, BLOCK))
    if weight.dtype == torch.int8:
        blocks = blocks * flat[:, inputs * BLOCK :].contiguous().view(torch.float32)[:, None]
    return blocks.permute(1, 0, 2).reshape(x.shape[0], -1)
