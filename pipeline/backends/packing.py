"""How a backend wants weights laid out in the shards that it loads. Knows shapes and layouts, not files or ranks.

Shapes: N output features (rows of a checkpoint's weight), K input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pipeline.models.weights import BLOCK, up_to

if TYPE_CHECKING:
    from torch import Tensor

WIDE = 1024
"""Columns from which blocks are transposed one by one, at 2 GB/s: torch does that for two contiguous axes of one dtype
in tiles. Three axes at once it walks in steps of a whole row, which from here on fall onto the same few cache lines."""


SCALE_ROWS = 4
"""Rows of an int8 block [I + 4, 32] that hold the bytes of its 32 float32 scales, after its I rows of weights."""


class Packing(Protocol):
    """A layout of weights. Packing a weight window by window, in windows of whole blocks of rows, packs the weight.

    A weight whose shape is kept is kept as it is.
    """

    name: str
    """Goes into the shards' headers."""

    def packed_shape(self, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
        """Shape in which a weight of local `shape` is stored."""
        ...

    def pack(self, weight: Tensor, kind: str, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """Lay out one weight, or one window of it that starts on a block; `out` receives it, converted to its dtype.

        Shapes: weight as in the checkpoint -> `packed_shape(weight.shape, kind)`; scales float32 [N] of kind `int8`.
        """
        ...


class PlainPacking:
    """Weights as the checkpoint has them."""

    name = "plain"

    def packed_shape(self, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:  # noqa: ARG002 - the protocol's
        """The shape itself."""
        return shape

    def pack(self, weight: Tensor, kind: str, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:  # noqa: ARG002 - the protocol's
        """Copy, or return the weight itself if there is nowhere to copy it to."""
        return weight.contiguous() if out is None else out.copy_(weight)


class BlockPacking:
    """2-D weights as blocks [ceil(N/32), K, 32], the rest plain; a block of int8 weights carries its scales.

    A product with a few rows of activations then reads memory in order, several times faster on CPUs than `x @ w.T`.
    """

    name = f"block{BLOCK}"

    def packed_shape(self, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
        """[N, K] -> [ceil(N/32), K, 32] for `linear` and `embedding`, four rows of scales more for `int8`."""
        if kind not in ("linear", "embedding", "int8"):
            return shape
        rows, columns = shape
        return (up_to(rows, BLOCK) // BLOCK, columns + (SCALE_ROWS if kind == "int8" else 0), BLOCK)

    def pack(self, weight: Tensor, kind: str, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """Transpose block by block; rows that fill the last block are zero."""
        packed = self.packed_shape(tuple(weight.shape), kind)
        if out is None:
            out = weight.new_empty(packed)
        if kind == "int8":
            assert scales is not None
            columns = weight.shape[1]
            padded = scales.new_zeros(packed[0] * BLOCK)
            padded[: len(scales)] = scales
            out[:, columns:].copy_(padded.view(packed[0], BLOCK).view(weight.dtype).view(packed[0], SCALE_ROWS, BLOCK))
            self.pack(weight, "linear", out[:, :columns])
            return out
        if packed == tuple(weight.shape):
            return out.copy_(weight)
        rows, columns = weight.shape
        whole = rows // BLOCK
        blocks = weight[: whole * BLOCK].contiguous().view(whole, BLOCK, columns)
        if columns < WIDE:
            out[:whole].copy_(blocks.transpose(1, 2))
        else:
            for place, block in zip(out, blocks, strict=False):
                place.copy_(block.t().contiguous())
        if rows % BLOCK:
            out[whole].zero_()
            out[whole, :, : rows % BLOCK].copy_(weight[whole * BLOCK :].t())
        return out
