"""Products of tokens with the blocked weights of their experts, as operators that read only experts with a token.

This module defines their results; Inductor compiles them from `block_experts_kernel.py`. An expert of number -1, which
stands on another rank, has zeros.

Shapes: M tokens, C experts of each, E experts, I input features, N output features (whole blocks of 32); an expert's
blocks as `BlockPacking` lays them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.backends.inductor.block_linear import block_linear
from pipeline.models.config import Activation, Clamp
from pipeline.models.parallel import Gating


@torch.library.custom_op("tandem::expert_gated", mutates_args=())
def expert_gated(
    x: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, biases: Sequence[Tensor], bounds: Sequence[float],
    gelu: bool = False,
) -> Tensor:  # fmt: skip
    """Compute SwiGLU of each token's experts in float32, rounded once: `silu(x @ gate.T) * (x @ up.T)` (Shazeer 2020).

    `biases` are none, or those of gate and up; `bounds` none, or those of a `Clamp`; `gelu`: GeGLU, of GELU by tanh.
    Shapes: x [M, I] of the model's dtype, chosen int32 [M, C], gate and up [E, N/32, ..] as of `block_swiglu`, biases
    of the model's dtype [E, up to N] -> x's dtype [M, C, N].
    """
    ids = chosen.flatten().long()
    products = [_products(x, chosen, weight)[:, None] for weight in (gate, up)]
    activation: Activation = "gelu_tanh" if gelu else "silu"
    wide = [functional.pad(bias.float(), (0, _outputs(gate) - bias.shape[1])) for bias in biases]
    gating = Gating((wide[0], wide[1]) if wide else None, Clamp(*bounds) if bounds else None, activation)
    inner = gating.of(products[0], products[1], ids).to(x.dtype).view(*chosen.shape, -1)
    return inner.masked_fill(chosen[..., None] < 0, 0)


@expert_gated.register_fake
def _(x: Tensor, chosen: Tensor, gate: Tensor, *_: object) -> Tensor:
    return x.new_empty(*chosen.shape, _outputs(gate))


def _products(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight.T` of each token and each of its experts: float32 [M * C, N]."""
    rows = x.repeat_interleave(chosen.shape[1], dim=0)
    return _each(rows, chosen, weight)


def _each(rows: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight.T` of each row and its own expert: float32 [M * C, N]."""
    none = rows.new_zeros(1, _outputs(weight), dtype=torch.float32)
    experts = chosen.flatten().tolist()
    parts = [none if e < 0 else block_linear(row[None], [weight[e]]) for row, e in zip(rows, experts, strict=True)]
    return torch.cat(parts)


@torch.library.custom_op("tandem::expert_linear", mutates_args=())
def expert_linear(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight.T` of each token and each of its experts, summed in float32.

    Shapes: x [M, C, I] of the model's dtype, chosen int32 [M, C], weight [E, N/32, ..] -> float32 [M, C, N].
    """
    return _each(x.flatten(0, 1), chosen, weight).view(*chosen.shape, -1)


@expert_linear.register_fake
def _(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*chosen.shape, _outputs(weight), dtype=torch.float32)


def _outputs(weight: Tensor) -> int:
    return weight.shape[1] * weight.shape[3]
