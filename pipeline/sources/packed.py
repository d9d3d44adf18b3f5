"""Matrices that a checkpoint stores quantised: where their values, scales and zero points are. Imports no torch.

One formula covers every format: weight[r, c] = (value[r, c] - zero[b, g]) * scale[b, g], with b the block of rows of r
and g the group of columns of c. `dequantise.py` computes it from the bytes that `cuts` name. Without scales it covers
numbers that a file has in another order: transposed, or every second row of a matrix or vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.sources.tensors import File, TensorRef

ALIGNMENT_BYTES = 8
"""Cuts start at multiples of this in a buffer: of any dtype's size."""

Codes = Literal["number", "e2m1", "e8m0", "nf4", "fp4"]
"""What a stored value is: a number, one of 16 values of a table, or an exponent of two (OCP MX formats)."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of a 4-bit float (OCP Microscaling Formats, version 1.0)."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E)."""

FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""Values of the 16 codes of bitsandbytes' 4-bit float, of which the largest is 1."""

TABLES: Mapping[Codes, tuple[float, ...]] = {"e2m1": E2M1, "nf4": NF4, "fp4": FP4}


@dataclass(frozen=True)
class Cut:
    """Part of a stored tensor: `count` pieces of `width` bytes, `stride` bytes apart, from the byte `start` on."""

    ref: TensorRef
    start: int
    count: int
    width: int
    stride: int

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.count * self.width

    @property
    def contiguous(self) -> bool:
        """Whether the pieces are one."""
        return self.count == 1 or self.width == self.stride

    @property
    def whole(self) -> TensorRef:
        """The bytes of contiguous pieces as a tensor."""
        return replace(
            self.ref, dtype="U8", shape=(self.nbytes,), offset=self.ref.offset + self.start, nbytes=self.nbytes
        )


@dataclass(frozen=True)
class Grid:
    """A matrix [rows, columns] of numbers as a file stores it.

    `transposed`: the file has it as [columns, rows]. `bits`: words of the stored dtype hold values of that size in a
    row, along the axis `along` of the matrix; `order` has the place of each value in a word where it is not ascending.
    `add` is added to a value, modulo the number of values where it `wraps`.
    """

    ref: TensorRef
    rows: int
    columns: int
    transposed: bool = False
    bits: int | None = None
    along: Literal["rows", "columns"] = "columns"
    order: tuple[int, ...] = ()
    add: int = 0
    wraps: bool = False
    codes: Codes = "number"

    @property
    def item(self) -> int:
        """Bytes of a stored word."""
        return SAFETENSORS[self.ref.dtype].size_bytes

    @property
    def word(self) -> int:
        """Bits of a stored word."""
        return 8 * self.item

    @property
    def stored(self) -> tuple[int, int]:
        """Shape of the stored matrix."""
        rows = self._words(self.rows) if self.along == "rows" else self.rows
        columns = self._words(self.columns) if self.along == "columns" else self.columns
        return (columns, rows) if self.transposed else (rows, columns)

    def _words(self, values: int) -> int:
        return values if self.bits is None else -(-values * self.bits // self.word)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the stored words along the rows that hold rows [first, last)."""
        if self.bits is None or self.along == "columns":
            return first, last
        return first * self.bits // self.word, self._words(last)

    def cut(self, first: int, last: int) -> Cut:
        """Return the bytes of rows [first, last)."""
        start, end = self.span(first, last)
        across = self.stored[1] * self.item
        if self.transposed:
            return Cut(self.ref, start * self.item, self.stored[0], (end - start) * self.item, across)
        return Cut(self.ref, start * across, 1, (end - start) * across, (end - start) * across)


@dataclass(frozen=True)
class Nested:
    """Scales that are quantised themselves: table[code] * scale + offset, float32.

    A block of `size` codes shares a scale. Blocks run over the codes of all rows.
    """

    scales: TensorRef
    table: TensorRef
    size: int
    offset: float

    def cuts(self, first: int, last: int) -> tuple[Cut, Cut]:
        """Return the bytes of the scales of codes [first, last), and of the table."""
        grid = Grid(self.scales, self.scales.shape[0], 1)
        return grid.cut(first // self.size, -(-last // self.size)), every_byte(self.table)


def every_byte(ref: TensorRef) -> Cut:
    """Return all bytes of a tensor."""
    return Cut(ref, 0, 1, ref.nbytes, ref.nbytes)


@dataclass(frozen=True)
class PackedRef:
    """Rows [first, last) of a matrix that is stored quantised; its values are read as float32.

    `block` is the number of rows and columns that share a scale; with `index`, that tensor has the group of each
    column. Values are multiplied with `factor` and rounded to the dtype `rounded`, as the format's own reader does.
    Row r is row r // `run` * `step` + `phase` + r % `run` of the stored matrix, of which all are read. `vector`: a
    column is a vector.
    """

    values: Grid
    scales: Grid | None
    block: tuple[int, int]
    last: int
    first: int = 0
    zeros: Grid | None = None
    index: TensorRef | None = None
    nested: Nested | None = None
    factor: float | None = None
    rounded: str | None = None
    step: int = 1
    phase: int = 0
    run: int = 1
    vector: bool = False

    @property
    def file(self) -> File:
        """File of the values."""
        return self.values.ref.file

    @property
    def offset(self) -> int:
        """Position of the values in their file."""
        return self.values.ref.offset

    @property
    def dtype(self) -> str:
        """Dtype of the values after dequantising, in the words of safetensors."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        rows = self.last - self.first
        return (rows,) if self.vector else (rows, self.values.columns)

    @property
    def stored(self) -> tuple[int, int]:
        """Stored rows [first, last) that hold these rows."""
        return self.first // self.run * self.step, -(-self.last // self.run) * self.step

    @property
    def read_bytes(self) -> int:
        """Bytes of a buffer that holds all cuts."""
        return sum(-(-cut.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for cut in self.cuts)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Stored tensors, in the order of their cuts."""
        grids = (self.values, self.scales, self.zeros)
        nested = () if self.nested is None else (self.nested.scales, self.nested.table)
        found = tuple(grid.ref for grid in grids if grid is not None)
        return (*found, *nested) if self.index is None else (*found, self.index)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Bytes of these rows: of the values, the scales, the zero points, the groups of columns or nested scales."""
        if self.last <= self.first:
            return ()
        blocks = self.blocks
        found = [self.values.cut(*self.stored)]
        if self.scales is not None:
            found.append(self.scales.cut(*blocks))
        if self.zeros is not None:
            found.append(self.zeros.cut(*blocks))
        if self.index is not None:
            found.append(every_byte(self.index))
        if self.nested is not None and self.scales is not None:
            found += self.nested.cuts(*(block * self.scales.columns for block in blocks))
        return tuple(found)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of rows that these rows touch."""
        first, last = self.stored
        return first // self.block[0], -(-last // self.block[0])

    def rows(self, first: int, last: int) -> PackedRef:
        """Return rows [first, last) of these."""
        return replace(self, first=self.first + first, last=self.first + last)

    def every(self, step: int, phase: int, run: int = 1) -> PackedRef:
        """Return the rows `phase`, `phase + step`, .. of a whole matrix, each with the `run` - 1 rows after it."""
        assert self.first == 0
        assert self.step == 1
        return replace(self, last=self.last // step * run, step=step, phase=phase, run=run)

    def part(self, index: int) -> PackedRef:
        """Not defined: quantised matrices of experts are taken apart when they are found."""
        raise AssertionError(index)


Source: TypeAlias = TensorRef | PackedRef
"""A tensor of a checkpoint: stored as it is, or quantised, or in another order."""


def transposed(ref: TensorRef) -> PackedRef:
    """Return the matrix [out, in] of numbers that a file has as [in, out]."""
    columns, rows = ref.shape
    return PackedRef(Grid(ref, rows, columns, transposed=True), None, (1, columns), rows)


def every(source: Source, step: int, phase: int, run: int = 1) -> PackedRef:
    """Return the rows `phase`, `phase + step`, .. of a matrix or vector, each with the `run` - 1 rows after it."""
    if isinstance(source, PackedRef):
        return source.every(step, phase, run)
    rows, columns = source.shape[0], math.prod(source.shape[1:])
    whole = PackedRef(Grid(source, rows, columns), None, (1, columns), rows, vector=len(source.shape) == 1)
    return whole.every(step, phase, run)


def placed(cuts: Sequence[Cut]) -> Iterator[tuple[int, Cut]]:
    """Yield each cut with its position in a buffer."""
    position = 0
    for cut in cuts:
        yield position, cut
        position += -(-cut.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plain(source: Source) -> TensorRef:
    """Return a tensor of a kind that no format quantises: a table of token ids."""
    assert isinstance(source, TensorRef)
    return source
