"""Sums and gathers over ranks, as blocking operators of a compiled graph.

They are functional and include the wait. Inductor (torch 2.13) lowers torch's own `_c10d_functional` operators to sums
in place with a separate wait. Observed faults: a fused kernel ran before the wait that its input needs, and, without
fusion, a tensor was freed while gloo's thread still wrote to it. An operator that returns a finished new tensor cannot
be reordered this way.
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
    """Gather every rank's `x`: [...] of any dtype -> [ranks, ...]."""
    out = x.new_empty(ranks, *x.shape)
    torch.distributed.all_gather(list(out), x.contiguous())
    return out


@all_gather.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(ranks, *x.shape)


C_FUNCTIONS = {
    all_reduce: "AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle, AtenTensorHandle*)",
    all_gather: "AOTITorchError aoti_torch_cpu_all_gather(AtenTensorHandle, int64_t, AtenTensorHandle*)",
}
"""C functions of the operators, defined in `include/tandem_subgraph.h`: a subgraph has no executor of operators."""


def c_functions() -> dict[torch._ops.OpOverload, list[str]]:
    """Return the operators with declarations of their C functions, as Inductor's configuration has them."""
    return {operator._opoverload: [declaration] for operator, declaration in C_FUNCTIONS.items()}
