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


@torch.library.custom_op("tandem_neuron::scatter_tokens", mutates_args=())
def scatter_tokens(x: Tensor, ranks: int) -> Tensor:
    """Sum over ranks, and keep a rank's share of axis 1: [B, T, ...] -> [B, T / ranks, ...]."""
    return x[:, : x.shape[1] // ranks].clone()


@scatter_tokens.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // ranks, *x.shape[2:])


@torch.library.custom_op("tandem_neuron::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, ranks: int) -> Tensor:
    """Concatenate axis 1 over ranks, in the order of the group: [B, T, ...] -> [B, ranks * T, ...]."""
    return torch.cat([x] * ranks, dim=1)


@gather_tokens.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * ranks, *x.shape[2:])


@torch.library.custom_op("tandem_neuron::read_block", mutates_args=())
def read_block(x: Tensor, row: Tensor, place: Tensor, size: int) -> Tensor:
    """Return `size` positions of a row from `place` on, int32 scalars: [R, H, S, D] -> [1, H, size, D]."""
    return x[int(row) : int(row) + 1, :, int(place) : int(place) + size].clone()


@read_block.register_fake
def _(x: Tensor, row: Tensor, place: Tensor, size: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    return x.new_empty(1, x.shape[1], size, *x.shape[3:])


@torch.library.custom_op("tandem_neuron::put_block", mutates_args=())
def put_block(x: Tensor, block: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Return `x` with a block [1, ...] in one of its rows, from `place` of axis 2 on, if it has one: [R, ...]."""
    out = x.clone()
    own = out[int(row) : int(row) + 1]
    (own if x.dim() < 3 else own[:, :, int(place) : int(place) + block.shape[2]]).copy_(block)
    return out


@put_block.register_fake
def _(x: Tensor, block: Tensor, row: Tensor, place: Tensor) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(x)


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
    torch.ops.tandem_neuron.scatter_tokens.default: "scatter_tokens",
    torch.ops.tandem_neuron.gather_tokens.default: "gather_tokens",
    torch.ops.tandem_neuron.read_block.default: "read_block",
    torch.ops.tandem_neuron.put_block.default: "put_block",
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
        regions = 1 if name in ("stablehlo.all_reduce", "stablehlo.reduce_scatter") else 0
        return self.ir.Operation.create(name, list(types), list(operands), parsed, regions=regions)

    @property
    def groups(self) -> str:
        """All ranks as one replica group."""
        return f"dense<[{self.group}]> : tensor<1x{len(self.group)}xi64>"


def _all_reduce(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001 - one signature for all
    return _sum(to, to.create("stablehlo.all_reduce", operands, types, replica_groups=to.groups))


def _scatter_tokens(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    attributes = {"scatter_dimension": "1 : i64", "replica_groups": to.groups}
    return _sum(to, to.create("stablehlo.reduce_scatter", operands, types, **attributes))


def _sum(to: Emitter, operation: Any) -> list[Any]:
    """Make a collective that reduces one that sums; return its results."""
    ir = to.ir
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(operation.results[0].type).element_type)
    block = ir.Block.create_at_start(operation.regions[0], [scalar, scalar], [ir.Location.current] * 2)
    with ir.InsertionPoint(block):
        total = to.create("stablehlo.add", block.arguments, [scalar])
        to.create("stablehlo.return", total.results, [])
    return list(operation.results)


def _all_gather(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    return _gather(to, operands, types, to.ir.RankedTensorType(types[0]).rank - 1)


def _gather_tokens(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    return _gather(to, operands, types, 1)


def _gather(to: Emitter, operands: Sequence[Any], types: Sequence[Any], axis: int) -> list[Any]:
    attributes = {"all_gather_dim": f"{axis} : i64", "replica_groups": to.groups}
    return list(to.create("stablehlo.all_gather", operands, types, **attributes).results)


def _starts(to: Emitter, like: Any, row: Any, place: Any) -> list[Any]:
    """Return the start of a block on each axis: of the first and the third, as far as there are any, else zero."""
    zero = to.create("stablehlo.constant", [], [row.type], value="dense<0> : tensor<i32>").result
    return [row, zero, place, zero][: to.ir.RankedTensorType(like.type).rank]


def _read_block(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    x, row, place = operands
    sizes = ", ".join(map(str, to.ir.RankedTensorType(types[0]).shape))
    starts = _starts(to, x, row, place)
    return list(to.create("stablehlo.dynamic_slice", [x, *starts], types, slice_sizes=f"array<i64: {sizes}>").results)


def _put_block(to: Emitter, operands: Sequence[Any], types: Sequence[Any], numbers: tuple[int, ...]) -> list[Any]:  # noqa: ARG001
    x, block, row, place = operands
    return list(to.create("stablehlo.dynamic_update_slice", [x, block, *_starts(to, x, row, place)], types).results)


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
    "all_reduce": _all_reduce, "all_gather": _all_gather, "scatter_tokens": _scatter_tokens,
    "gather_tokens": _gather_tokens, "read_block": _read_block, "put_block": _put_block, "top_k": _top_k,
    "dot": _dot, "product": _product,
}  # fmt: skip
