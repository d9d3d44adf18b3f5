"""Windows of a checkpoint: some rows of one tensor, read once, then packed and cut for the ranks that store them.

Reads and writes no files: `shard_files` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SourceError
from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.graphs.packing import INT4_BYTES, SCALE_BYTES, Packing
from pipeline.models import int4, int8
from pipeline.models.config import ModelConfig
from pipeline.models.rank_slices import kv_head_of, local_heads, owner, padded_vocab, q_heads_of
from pipeline.models.weights import BLOCK, INT4_GROUP, WeightSpec, up_to
from pipeline.sources.dequantise import dequantised
from pipeline.sources.packed import PackedRef, Source
from pipeline.stages.streams import Bytes, Place

WINDOW_BYTES = 4 << 20

INT4 = "U8"
"""How headers name 4-bit weights: bytes of codes and scales. No other weight is stored as bytes."""


@dataclass(frozen=True)
class ColumnRange:
    """Columns [first, last) of a window, then `zeros` more, and the ranks that store them."""

    first: int
    last: int
    ranks: tuple[int, ...]
    zeros: int = 0

    @property
    def width(self) -> int:
        """Columns that are stored."""
        return self.last - self.first + self.zeros


@dataclass(frozen=True)
class Window:
    """Some rows of one tensor, read once: `real` rows from `source`, then zeros up to `rows`.

    Where the packing turns them, they are columns at a `place` of a matrix (else None).
    """

    source: Source
    spec: WeightSpec
    dtype: str
    rows: int
    real: int
    parts: tuple[ColumnRange, ...]
    place: Place | None = None

    @property
    def width(self) -> int:
        """Elements in a row: 1 in a 1-D tensor."""
        return math.prod(self.spec.shape[1:])

    @property
    def read_bytes(self) -> int:
        """Bytes of the window as read."""
        if isinstance(self.source, PackedRef):
            return self.source.read_bytes
        return self.rows * self.width * SAFETENSORS[self.source.dtype].size_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes that hold the window as stored, once for each part."""
        blocks = up_to(self.rows, BLOCK) // BLOCK
        if self.dtype == INT4:
            return blocks * BLOCK * self.width // INT4_GROUP * INT4_BYTES
        scales = SCALE_BYTES * len(self.parts) if self.dtype == "I8" else 0
        return blocks * (BLOCK * self.width * SAFETENSORS[self.dtype].size_bytes + scales)


def windows(
    spec: WeightSpec, source: Source, dtype: str, config: ModelConfig, tp: int, place: Place | None = None
) -> Iterator[Window]:  # fmt: skip
    """Cut one tensor into windows of whole blocks; each byte is read once, but for KV heads that many ranks need.

    `place`: as in `Window`.
    """
    row_bytes = math.prod(spec.shape[1:]) * SAFETENSORS[source.dtype].size_bytes
    step = max(WINDOW_BYTES // row_bytes // BLOCK, 1) * BLOCK
    for first, last, end, parts in _spans(spec, config.of_weight(spec.name), tp):
        for start in range(first, last, step):
            rows = min(step, last - start)
            real = max(min(rows, end - start), 0)
            yield Window(source.rows(start, start + real), spec, dtype, rows, real, parts, place)


Span = tuple[int, int, int, tuple[ColumnRange, ...]]
"""First row, last row, the row from which on all are zeros, and the columns of ranks."""


def _spans(spec: WeightSpec, config: ModelConfig, tp: int) -> Iterator[Span]:
    """Yield row ranges of a tensor, in rank order, and the ranks that store their columns; zeros pad the end."""
    rows, width = spec.shape[0], math.prod(spec.shape[1:])
    everyone = tuple(range(tp))
    if spec.split == "replicate":
        yield 0, rows, rows, (ColumnRange(0, width, everyone),)
    elif spec.split == "columns":
        share = width // tp
        yield 0, rows, rows, tuple(ColumnRange(rank * share, (rank + 1) * share, (rank,)) for rank in everyone)
    elif spec.split == "experts":
        assert spec.expert is not None
        yield 0, rows, rows, (ColumnRange(0, width, (owner(spec.expert, tp),)),)
    elif spec.split in ("q_rows", "q_heads", "q_columns"):
        yield from _head_spans(spec, config, tp)
    elif spec.split == "kv_rows":
        holders: dict[tuple[int, int], list[int]] = {}
        for rank in everyone:
            holders.setdefault(kv_head_of(rank, config, tp), []).append(rank)
        for (first, last), ranks in holders.items():
            size, end = config.head_dim, last * config.head_dim
            yield first * size, end, end, (ColumnRange(0, width, tuple(ranks)),)
    else:
        share = (padded_vocab(rows, tp) if spec.split == "vocab" else rows) // tp
        for rank in everyone:
            yield rank * share, (rank + 1) * share, rows, (ColumnRange(0, width, (rank,)),)


def _head_spans(spec: WeightSpec, config: ModelConfig, tp: int) -> Iterator[Span]:
    """Yield the spans of query heads: as rows of each rank, or as columns of all rows."""
    size, width = 1 if spec.split == "q_heads" else config.head_dim, math.prod(spec.shape[1:])
    share = local_heads(config, tp) * size
    ranges = [(first * size, last * size) for first, last in (q_heads_of(rank, config, tp) for rank in range(tp))]
    if spec.split != "q_columns":
        for rank, (first, last) in enumerate(ranges):
            yield first, first + share, last, (ColumnRange(0, width, (rank,)),)
        return
    columns = (ColumnRange(first, last, (rank,), share - (last - first)) for rank, (first, last) in enumerate(ranges))
    yield 0, spec.shape[0], spec.shape[0], tuple(columns)


def stored_sizes(window: Window, packing: Packing) -> Iterator[tuple[int, int]]:
    """Yield each rank that stores columns of a window, and their bytes."""
    item = SAFETENSORS[window.dtype].size_bytes
    for part in window.parts:
        size = math.prod(_packed_shape(window, packing, part.width)) * item
        yield from ((rank, size) for rank in part.ranks)


def pieces(window: Window, data: Tensor, out: Tensor, packing: Packing) -> Iterator[tuple[Bytes, tuple[int, ...]]]:
    """Convert, pack and cut a window; yield bytes and the ranks that store them. `out` holds them until the next."""
    whole = _values(window, data)
    scales = None
    if window.dtype == "I8":  # by whole rows, before ranks take their columns
        whole, scales = int8.quantise(whole)
    if window.dtype == INT4:
        whole, scales = int4.quantise(whole)
    if _packs_whole(window, packing):
        packed = _packed(window, whole, out, packing)
        width = packed.shape[1] // window.width
        for part in window.parts:
            yield packed[:, part.first * width : part.last * width], part.ranks
    else:
        for part in window.parts:
            columns = functional.pad(whole[:, part.first : part.last], (0, part.zeros))
            yield _packed(window, columns, out, packing, _scales_of(part, scales)), part.ranks


def _scales_of(part: ColumnRange, scales: Tensor | None) -> Tensor | None:
    """Return the scales of some columns: those of whole rows, or of their groups of columns."""
    if scales is None or scales.dim() == 1:
        return scales
    return functional.pad(scales[:, part.first // INT4_GROUP : part.last // INT4_GROUP], (0, part.zeros // INT4_GROUP))


def _values(window: Window, data: Tensor) -> Tensor:
    """Return the rows of a window, as stored or dequantised, then zeros."""
    if isinstance(window.source, PackedRef):
        real = dequantised(window.source, data)
        return functional.pad(real, (0, 0, 0, window.rows - window.real)) if window.real < window.rows else real
    return data.view(SAFETENSORS[window.source.dtype].as_torch()).view(window.rows, *window.spec.shape[1:])


def _packs_whole(window: Window, packing: Packing) -> bool:
    """Return whether packed columns are columns of the packed window; scales, padding and odd widths prevent that."""
    if window.dtype in ("I8", INT4) or window.place or any(part.zeros for part in window.parts):
        return False
    widths = {part.last - part.first for part in window.parts} | {window.width}
    shapes = [_packed_shape(window, packing, width) for width in widths]
    return len({len(shape) for shape in shapes}) == 1


def _packed_shape(window: Window, packing: Packing, width: int) -> tuple[int, ...]:
    shape = (window.rows, width) if len(window.spec.shape) > 1 else (window.rows,)
    return packing.packed_shape(shape, window.spec.kind, SAFETENSORS[window.dtype].name)


def _packed(window: Window, weight: Tensor, out: Tensor, packing: Packing, scales: Tensor | None = None) -> Bytes:
    """Return a weight as stored: bytes [rows or blocks, bytes of each], in `out` unless it is stored as it was read."""
    dtype = SAFETENSORS[window.dtype].as_torch()
    shape = packing.packed_shape(tuple(weight.shape), window.spec.kind, SAFETENSORS[window.dtype].name)
    if shape != weight.shape or weight.dtype != dtype or window.place:
        stored = out[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        packing.pack(weight, window.spec.kind, stored, scales)
        _refuse_overflow(stored, window)
        weight = stored
    return weight.reshape(len(weight), -1).view(torch.uint8).numpy()


def _refuse_overflow(stored: Tensor, window: Window) -> None:
    if stored.dtype == torch.float16 and not bool(stored.isfinite().all()):
        what = f"{window.spec.name} has values that float16 cannot hold"
        raise SourceError(what, where=str(window.source.file), fix="use dtype: bfloat16 or float32")
