"""What a traced graph costs, counted on its HLO: memory, products, collectives, shapes that are slow on the chip.

Works on any protobuf message shaped like XLA's `HloModuleProto`, as `hlo.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.backends.neuron.hlo import FLOAT, TOP_K
from pipeline.recipe.chips import Core

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 16: 2}
"""Bytes of an element, by XLA's number of the data type."""

FREE = frozenset(["parameter", "constant", "iota", "broadcast", "reshape", "bitcast", "tuple", "get-tuple-element"])
"""Operators that a compiler makes no tensor for: views, and values that it makes where they are read."""

COLLECTIVES = frozenset(["all-reduce", "all-gather", "reduce-scatter"])
VIEWS = frozenset(["reshape", "bitcast", "get-tuple-element", "broadcast"])
IN_PLACE = frozenset(["scatter", "dynamic-update-slice"])
"""Operators that write into their first operand: a state, whose memory the result has."""
FUSED = frozenset((
    "abs", "add", "and", "clamp", "compare", "convert", "cosine", "divide", "exponential", "floor", "log", "logistic",
    "maximum", "minimum", "multiply", "negate", "not", "or", "rsqrt", "select", "sine", "sqrt", "subtract", "tanh",
))  # fmt: skip
"""Operators of single elements, which a compiler computes in one loop with their readers."""


@dataclass(frozen=True)
class Largest:
    """The largest intermediate of a graph that is not the result of an operator of single elements."""

    bytes: int
    opcode: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Counts over one graph."""

    dot_flops: Mapping[str, int]
    """Multiplications and additions of products, by the dtype of their operands."""
    largest: Largest
    peak_bytes: int
    """Most bytes of intermediates that live at a time, in the order of the HLO."""
    read_bytes: int
    """Bytes of weights and caches that products read, each time that they do: about what a run reads."""
    transposed_bytes: int
    """Bytes of weights and caches that are transposed before they are read."""
    transposes: int
    """Transposes of weights and caches."""
    contracted: Mapping[int, int]
    """Products with a matrix that is a parameter, by the axis of it that they contract."""
    collective_bytes: Mapping[str, int]
    """Bytes of each kind of collective, before a reduction or after a gather; an all-reduce moves them twice."""
    sent: tuple[tuple[str, tuple[int, ...]], ...]
    """Collectives, and the shape of what a rank gives to them."""
    scattered_rows: int
    """Most rows that one scatter writes."""
    widest_top: int
    """Most entries of a row of a top-k."""
    operators: Mapping[str, int]


def costs(hlo: Any) -> Costs:
    """Count one graph's entry computation."""
    entry = next(c for c in hlo.computations if c.id == hlo.entry_computation_id)
    by_id = {one.id: one for one in entry.instructions}
    made = [one for one in entry.instructions if one.opcode not in FREE]
    stored = [one for one in made if one.opcode not in FUSED | IN_PLACE]
    turned = [one for one in made if one.opcode == "transpose" and _source(one, by_id).opcode == "parameter"]
    largest = max(stored, key=_bytes, default=entry.instructions[0])
    return Costs(
        dot_flops=_dot_flops(made, by_id),
        largest=Largest(_bytes(largest), largest.opcode, tuple(largest.shape.dimensions)),
        peak_bytes=_peak(entry),
        read_bytes=_read_bytes(made, by_id),
        transposed_bytes=sum(map(_bytes, turned)),
        transposes=len(turned),
        contracted=_contracted(made, by_id),
        collective_bytes=_collectives(made, by_id),
        sent=tuple(sorted({(one.opcode, _operand(one, by_id)) for one in made if one.opcode in COLLECTIVES})),
        scattered_rows=max((_rows(one, by_id) for one in made if one.opcode == "scatter"), default=0),
        widest_top=max((_operand(one, by_id)[-1] for one in made if one.custom_call_target == TOP_K), default=0),
        operators=Counter(one.opcode for one in entry.instructions),
    )


def _bytes(instruction: Any) -> int:
    shape = instruction.shape
    shapes = list(shape.tuple_shapes) or [shape]
    return sum(SIZES.get(one.element_type, 0) * math.prod(one.dimensions) for one in shapes)


def _dot_flops(made: list[Any], by_id: Mapping[int, Any]) -> dict[str, int]:
    flops: Counter[str] = Counter()
    for one in made:
        if one.opcode == "dot":
            left = by_id[one.operand_ids[0]].shape
            depth = math.prod(left.dimensions[i] for i in one.dot_dimension_numbers.lhs_contracting_dimensions)
            flops[FLOAT.get(left.element_type, "integer")] += 2 * depth * math.prod(one.shape.dimensions)
    return dict(flops)


def _peak(entry: Any) -> int:
    """Return the most bytes of intermediates that live at a time: from their operator to their last reader."""
    source: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, one in enumerate(entry.instructions):
        operands = [source.get(i, i) for i in one.operand_ids]
        last.update(dict.fromkeys(operands, place))
        if one.opcode in VIEWS | IN_PLACE and operands:
            source[one.id] = operands[0]
    live = peak = 0
    ending: dict[int, list[int]] = {}
    for place, one in enumerate(entry.instructions):
        if one.opcode not in FREE | IN_PLACE:
            size = _bytes(one)
            live += size
            ending.setdefault(last.get(one.id, len(entry.instructions)), []).append(size)
        peak = max(peak, live)
        live -= sum(ending.pop(place, []))
    return peak


def _read_bytes(made: list[Any], by_id: Mapping[int, Any]) -> int:
    operands = [by_id[i] for one in made if one.opcode == "dot" for i in one.operand_ids]
    return sum(_bytes(one) for one in operands if _source(one, by_id).opcode == "parameter")


def _contracted(made: list[Any], by_id: Mapping[int, Any]) -> dict[int, int]:
    axes: Counter[int] = Counter()
    for one in made:
        source = _source(by_id[one.operand_ids[1]], by_id) if one.opcode == "dot" else one
        if source.opcode == "parameter" and len(source.shape.dimensions) == 2:
            axes.update(one.dot_dimension_numbers.rhs_contracting_dimensions)
    return dict(axes)


def _source(instruction: Any, by_id: Mapping[int, Any]) -> Any:
    """Return the instruction whose memory this one has, or a part of."""
    while instruction.opcode in VIEWS | IN_PLACE | {"slice", "convert", "transpose"}:
        instruction = by_id[instruction.operand_ids[0]]
    return instruction


def _operand(instruction: Any, by_id: Mapping[int, Any]) -> tuple[int, ...]:
    return tuple(by_id[instruction.operand_ids[0]].shape.dimensions)


def _rows(scatter: Any, by_id: Mapping[int, Any]) -> int:
    """Return the rows of a scatter: its indices have the places of each on their last axis."""
    return math.prod(by_id[scatter.operand_ids[1]].shape.dimensions[:-1])


def _collectives(made: list[Any], by_id: Mapping[int, Any]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one in made:
        if one.opcode in COLLECTIVES:
            found[one.opcode] += max(_bytes(one), _bytes(by_id[one.operand_ids[0]]))
    return dict(found)


def floor_s(found: Costs, core: Core) -> float:
    """Return a lower bound of a graph's time on a logical core: the larger of its products and its reads."""
    return max(sum(found.dot_flops.values()) / core.flops, found.read_bytes / core.bytes_per_s)
