"""Operators that torch has no lowering for, as torch operators for the trace and as StableHLO.

The functions of the torch operators compute one rank's result, for shapes and for eager runs on one rank.

Shapes: leading axes of the second operand of `dot`, all but its last two, are batch axes of both operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.neuron.hlo import TOP_K


@torch.library.custom_op("tandem_neuron::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """Sum over ranks: [...] -> the same."""
    return x.clone()


@all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("tandem_neuron::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int) -> Tensor:
    """Concatenate the last axis over ranks, in the order of the group: [..., N] -> [..., ranks * N]."""
    return torch.cat([x] * ranks, dim=-1)


@all_gather.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * ranks)


@torch.library.custom_op("tandem_neuron::top_k", mutates_args=())
def top_k(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest entries of the last axis, descending, and their int32 indices."""
    values, indices = torch.topk(x, count, dim=-1)
    return values, indices.int()


@top_k.register_fake
def _(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty(*x.shape[:-1], count)
    return values, torch.empty_like(values, dtype=torch.int32)


@torch.library.custom_op("tandem_neuron::dot", mutates_args=())
def dot(x: Tensor, y: Tensor, wide: bool) -> Tensor:
    """Multiply along the last axis of both, without a transpose: [*b, M, K], [*b, N, K] -> [*b, M, N].

    `wide`: the result is float32, else of the dtype of the operands.
    """
    product = x.float() @ y.float().transpose(-1, -2)
    return product if wide else product.to(x.dtype)


@dot.register_fake
def _(x: Tensor, y: Tensor, wide: bool) -> Tensor:
    dtype = torch.float32 if wide else x.dtype
    return torch.empty((*x.shape[:-1], y.shape[-2]), dtype=dtype, device=x.device)


@torch.library.custom_op("tandem_neuron::product", mutates_args=())
def product(x: Tensor, weight: Tensor, wide: bool) -> Tensor:
    """Multiply by a weight whose first axis is contracted: [..., M, K], [K, N] -> [..., M, N]; `wide` as in `dot`."""
    result = x.float() @ weight.float()
    return result if wide else result.to(x.dtype)


@product.register_fake
def _(x: Tensor, weight: Tensor, wide: bool) -> Tensor:
    dtype = torch.float32 if wide else x.dtype
    return torch.empty((*x.shape[:-1], weight.shape[1]), dtype=dtype, device=x.device)


@dataclass(frozen=True)
class Cut:
    """One call of an operator in a traced graph: its name, and its arguments that are no tensors."""

    operator: str
    numbers: tuple[int, ...]


OPERATORS: Mapping[Any, str] = {
    torch.ops.tandem_neuron.all_reduce.default: "all_reduce",
    torch.ops.tandem_neuron.all_gather.default: "all_gather",
    torch.ops.tandem_neuron.top_k.default: "top_k",
    torch.ops.tandem_neuron.dot.default: "dot",
    torch.ops.tandem_neuron.product.default: "product",
}
"""Operator in a traced graph -> its name in `EMIT`."""


class Emitter:
    """Writes operators as StableHLO at the current insertion point; `ir` is jaxlib's MLIR."""

    def __init__(self, ir: Any, group: Sequence[int]) -> None:
        self.ir, self.group = ir, list(group)

    def emit(self, cut: Cut, operands: Sequence[Any], types: Sequence[Any]) -> list[Any]:
        """Write one operator; return its results."""
        return EMIT[cut.operator](self, operands, types, cut.numbers)

    def create(self, name: str, operands: Sequence[Any], types: Sequence[Any], **attributes: str) -> Any:
        """Create an operation; attributes are in MLIR's text form."""
        parsed = {key: self.ir.Attribute.parse(text) for key, text in attributes.items()}
        regions = 1 if name == "stablehlo.all_reduce" else 0
        return self.ir.Operation.create(name, list(types), list(operands), parsed, regions=regions)

    @property
    def groups(self) -> str:
        """All ranks as one replica group."""
        return f"dense<[{self.group}]> : tensor<1x{len(self.group)}xi64>"


def _all_reduce(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001 - one signature for all
    ir = to.ir
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(types[0]).element_type)
    operation = to.create("stablehlo.all_reduce", operands, types, replica_groups=to.groups)
    block = ir.Block.create_at_start(operation.regions[0], [scalar, scalar], [ir.Location.current] * 2)
    with ir.InsertionPoint(block):
        total = to.create("stablehlo.add", block.arguments, [scalar])
        to.create("stablehlo.return", total.results, [])
    return list(operation.results)


def _all_gather(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    axis = to.ir.RankedTensorType(types[0]).rank - 1
    attributes = {"all_gather_dim": f"{axis} : i64", "replica_groups": to.groups}
    return list(to.create("stablehlo.all_gather", operands, types, **attributes).results)


def _top_k(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:
    """Write the compiler's custom call, whose indices are unsigned, as in AWS's nkipy."""
    ir = to.ir
    indices = ir.RankedTensorType(types[1])
    unsigned = ir.RankedTensorType.get(indices.shape, ir.IntegerType.get_unsigned(32))
    attributes = {"call_target_name": f'"{TOP_K}"', "backend_config": f'"{numbers[0]}"', "api_version": "1 : i32"}
    call = to.create("stablehlo.custom_call", operands, [types[0], unsigned], **attributes)
    return [call.results[0], to.create("stablehlo.convert", [call.results[1]], [indices]).result]


def _dot(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    left, right = (to.ir.RankedTensorType(operand.type).rank for operand in operands)
    batch = list(range(right - 2))
    axes = f"lhs_contracting_dimensions = [{left - 1}], rhs_contracting_dimensions = [{right - 1}]"
    if batch:
        axes = f"lhs_batching_dimensions = {batch}, rhs_batching_dimensions = {batch}, {axes}"
    numbers_of = f"#stablehlo.dot<{axes}>"
    return list(to.create("stablehlo.dot_general", operands, types, dot_dimension_numbers=numbers_of).results)


def _product(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    left = to.ir.RankedTensorType(operands[0].type).rank
    axes = f"#stablehlo.dot<lhs_contracting_dimensions = [{left - 1}], rhs_contracting_dimensions = [0]>"
    return list(to.create("stablehlo.dot_general", operands, types, dot_dimension_numbers=axes).results)


Emit = Callable[[Emitter, Sequence[Any], Sequence[Any], tuple[int, ...]], list[Any]]
EMIT: Mapping[str, Emit] = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "top_k": _top_k, "dot": _dot, "product": _product,
}  # fmt: skip
