"""Sums and gathers over ranks, as operators that a compiled graph calls and waits for.

They are functional and whole on purpose. Inductor (torch 2.13) lowers torch's own `_c10d_functional` operators to sums
in place with a wait beside them: it was seen to place a fused kernel before the wait that one of its inputs needs, and,
with fusion off, to let go of a tensor that gloo's thread still wrote to. An operator that takes a tensor and returns
another, finished one leaves it nothing to reorder.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp


@torch.library.custom_op("tandem::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """Sum over ranks of the default group: [...] of any dtype -> the same."""
    out = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(out, ReduceOp.SUM)
    return out


@all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tandem::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int) -> Tensor:
    """Every rank's `x`: [...] of any dtype -> [ranks, ...]."""
    out = x.new_empty(ranks, *x.shape)
    torch.distributed.all_gather(list(out), x.contiguous())
    return out


@all_gather.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(ranks, *x.shape)
