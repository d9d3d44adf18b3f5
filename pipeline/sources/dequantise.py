"""Values of quantised matrices, from the bytes that `PackedRef.cuts` name. Needs torch.

Shapes: R rows, C columns, G groups of columns, B blocks of rows, W stored words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.sources.packed import TABLES, Cut, Grid, Nested, PackedRef, placed

E8M0_BIAS = 127
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def dequantised(source: PackedRef, data: Tensor) -> Tensor:
    """Return the rows of a matrix, float32 [R, C], or vector; `data` are the bytes of its cuts, uint8."""
    parts = [(cut, data[at : at + cut.nbytes]) for at, cut in placed(source.cuts)]
    if not parts:
        return torch.empty(source.shape, dtype=torch.float32)
    values_RC = _numbers(source.values, *source.stored, *parts[0])
    if source.scales is not None:
        blocks = source.blocks
        group_C = None if source.index is None else parts[-1][1].view(torch.int32).long()
        scales_BG = _numbers(source.scales, *blocks, *parts[1])
        if source.nested is not None:
            scales_BG = _of_codes(source.nested, scales_BG, blocks[0], parts[-2][1], parts[-1][1])
        zeros_BG = None if source.zeros is None else _numbers(source.zeros, *blocks, *parts[2])
        _apply(source, values_RC, (zeros_BG, scales_BG), group_C)
        if source.factor is not None:
            values_RC *= source.factor
        if source.rounded is not None:
            values_RC = values_RC.to(SAFETENSORS[source.rounded].as_torch()).float()
    return _chosen_rows(source, values_RC).contiguous().view(source.shape)


def _chosen_rows(source: PackedRef, values_RC: Tensor) -> Tensor:
    """Return the rows that a matrix has of the stored ones."""
    runs = values_RC.unflatten(0, (-1, source.step))[:, source.phase : source.phase + source.run]
    first = source.first % source.run
    return runs.flatten(0, 1)[first : first + source.last - source.first]


def _of_codes(nested: Nested, codes_BG: Tensor, first: int, scales: Tensor, table: Tensor) -> Tensor:
    """Return the scales of blocks of rows from `first` on, from their codes and the bytes of the nested scales."""
    code = first * codes_BG.shape[1]
    block = torch.arange(code, code + codes_BG.numel()) // nested.size - code // nested.size
    looked_up_BG = _looked_up(table.view(torch.float32), codes_BG)
    return looked_up_BG * scales.view(torch.float32)[block].view(codes_BG.shape) + nested.offset


def _apply(
    source: PackedRef, values_RC: Tensor, zeros_and_scales: tuple[Tensor | None, Tensor], group_C: Tensor | None
) -> None:  # fmt: skip
    """Subtract zero points from values in place, and multiply with scales. Keeps the order of values in memory."""
    width, columns = source.block[1], source.values.columns
    zeros, scales = (None if of is None else _of_rows(source, of) for of in zeros_and_scales)
    assert scales is not None
    if group_C is None and columns == scales.shape[1] * width:
        values = values_RC.unflatten(1, (-1, width))
        zeros, scales = None if zeros is None else zeros[..., None], scales[..., None]
    else:
        values = values_RC
        zeros, scales = (None if of is None else _of_columns(of, width, columns, group_C) for of in (zeros, scales))
    if zeros is not None:
        values -= zeros
    assert scales is not None
    values *= scales


def _of_rows(source: PackedRef, of_blocks_BG: Tensor) -> Tensor:
    """Return the numbers of each row's block; of one block as they are, to be broadcast."""
    height = source.block[0]
    if height == 1 or len(of_blocks_BG) == 1:
        return of_blocks_BG
    row_R = torch.arange(*source.stored) // height - source.blocks[0]
    return of_blocks_BG[row_R]


def _of_columns(of_groups_RG: Tensor, width: int, columns: int, group_C: Tensor | None) -> Tensor:
    """Return the number of each column's group, columns outermost in memory, as formats with such groups store them."""
    if group_C is None:
        group_C = torch.arange(columns) // width
    return of_groups_RG.T[group_C].T


def _numbers(grid: Grid, first: int, last: int, cut: Cut, data: Tensor) -> Tensor:
    """Return rows [first, last) of a stored matrix, float32."""
    words = data.view(SAFETENSORS[grid.ref.dtype].as_torch()).view(-1, cut.width // grid.item)
    if not grid.transposed:
        words = words.view(-1, grid.stored[1])
    words = words.T if grid.transposed else words
    if grid.bits is not None:
        words = _unpacked(grid, words, first, last)
    return _decoded(grid, words)


def _decoded(grid: Grid, values: Tensor) -> Tensor:
    """Return the numbers that stored values stand for: a new tensor."""
    if grid.codes in TABLES:
        return _looked_up(torch.tensor(TABLES[grid.codes]), values)
    if grid.codes == "e8m0" and values.dtype == torch.uint8:
        return torch.exp2(values.float() - E8M0_BIAS)
    if values.dtype in FLOAT8:
        return _looked_up(torch.arange(256, dtype=torch.uint8).view(values.dtype).float(), values.view(torch.uint8))
    if grid.wraps and grid.bits is not None:
        return ((values + grid.add) & ((1 << grid.bits) - 1)).float()
    return values.float() + grid.add if grid.add else values.float()


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return a table's entries of codes: four times as fast as torch converts 8-bit floats on a CPU."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _unpacked(grid: Grid, words: Tensor, first: int, last: int) -> Tensor:
    """Return the values in the words of rows [first, last), int32 or int64."""
    assert grid.bits is not None
    if grid.along == "columns" and grid.transposed and grid.word % grid.bits == 0:  # as stored: rows stay innermost
        places = torch.arange(grid.word // grid.bits, dtype=torch.int32)[:, None] * grid.bits
        return ((words.T.int()[:, None] >> places) & ((1 << grid.bits) - 1)).flatten(0, 1)[: grid.columns].T
    if grid.along == "columns":
        return _in_words(grid, words, 0, grid.columns)
    skipped = first * grid.bits - grid.span(first, last)[0] * grid.word
    return _in_words(grid, words.T, skipped, last - first).T


def _in_words(grid: Grid, words_XW: Tensor, skipped: int, count: int) -> Tensor:
    """Return `count` values of each row of words, after some bits."""
    assert grid.bits is not None
    mask = (1 << grid.bits) - 1
    if grid.word % grid.bits == 0:
        start = skipped // grid.bits
        places = torch.tensor(grid.order or range(grid.word // grid.bits), dtype=torch.int32) * grid.bits
        return ((words_XW.int()[..., None] >> places) & mask).flatten(1)[:, start : start + count]
    bit = torch.arange(count) * grid.bits + skipped
    wide_XW = torch.nn.functional.pad(words_XW.long() & ((1 << grid.word) - 1), (0, 1))
    at, shift = bit // grid.word, bit % grid.word
    return ((wide_XW[:, at] | wide_XW[:, at + 1] << grid.word) >> shift) & mask
