"""Layouts of weights in shards. Depends on shapes, not on files or ranks; imports torch only to pack.

Shapes: N output features (rows of a checkpoint's weight), K input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pipeline.models.weights import BLOCK, INT4_GROUP, up_to

if TYPE_CHECKING:
    from torch import Tensor

WIDE = 1024
"""Columns from which blocks are transposed one at a time, at 2 GB/s: torch transposes two contiguous axes of one dtype
in tiles. It copies three axes in strides of a whole row, which from this width on map to the same few cache lines."""

SCALE_BYTES = 4 * BLOCK
"""Bytes of the float32 scales of an int8 block, which follow its weights."""

INT4_BYTES = INT4_GROUP // 2 + 2
"""Bytes of a group of 4-bit weights of an output: codes and a float16 scale."""

MATRICES = ("linear", "embedding")


class Packing(Protocol):
    """A layout of weights. Packing a weight window by window, in windows of whole blocks of rows, packs the weight.

    A weight whose packed shape equals its shape is copied unchanged, unless it `turns`: a packed window is then columns
    of the packed weight. Dtypes have their names in recipes: `float32`, `bfloat16`, `int8`, ..
    """

    name: str
    """Name in the shards' headers."""

    fuses: bool
    """Whether matrices that read the same input are stored as one (`models.weights.FUSED`)."""

    def turns(self, kind: str) -> bool:
        """Return whether a weight of this kind is stored transposed."""
        ...

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:
        """Return the shape in which a weight of local `shape` is stored as `dtype`."""
        ...

    def pack(self, weight: Tensor, kind: str, out: Tensor, scales: Tensor | None = None) -> None:
        """Write one weight, or a window of it that starts on a block, to `out` in this layout and in its dtype.

        Shapes: weight as in the checkpoint -> `packed_shape(weight.shape, kind, dtype)`; scales float32 [N] of an int8
        weight, float16 [N, K / 32] of a 4-bit one, whose `weight` are its codes.
        """
        ...


class PlainPacking:
    """The checkpoint's own layout."""

    name = "plain"
    fuses = False

    def turns(self, kind: str) -> bool:  # noqa: ARG002 - the protocol's
        """Return False."""
        return False

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:  # noqa: ARG002 - the protocol's
        """Return the shape unchanged."""
        return shape

    def pack(self, weight: Tensor, kind: str, out: Tensor, scales: Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Copy the weight."""
        out.copy_(weight)


class BlockPacking:
    """2-D weights in blocks of 32 rows, all other weights plain.

    A product with a few rows of activations then reads memory in order, several times faster on CPUs than `x @ w.T`.
    A block of float32 or float16 is [K, 32]. Of bfloat16 and int8 it is [K / 2, 32, 2], two inputs adjacent, as
    processors multiply them ([K, 32] where K is odd); an int8 block ends with the bytes of its scales, as two more
    of its K / 2 (four of K). A block of 4-bit weights (uint8) is [K / 32, 32, 18]: of each group of 32 inputs 512 bytes
    of codes in pairs, the low bits of outputs 0 to 15, the high ones of 16 to 31, then 32 float16 scales.
    """

    name = f"block{BLOCK}-pairs"
    fuses = False

    def turns(self, kind: str) -> bool:  # noqa: ARG002 - the protocol's
        """Return False: a block is transposed in itself."""
        return False

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:
        """Return [ceil(N/32), K, 32] or [ceil(N/32), K/2, 32, 2] for [N, K] of matrices, and of each expert."""
        if kind == "experts":
            return (shape[0], *self.packed_shape(shape[1:], "linear", dtype))
        if kind not in MATRICES:
            return shape
        rows, columns = shape
        blocks = up_to(rows, BLOCK) // BLOCK
        if dtype == "uint8":
            return blocks, columns // INT4_GROUP, BLOCK, INT4_BYTES
        columns += SCALE_BYTES // BLOCK if dtype == "int8" else 0
        return (blocks, columns // 2, BLOCK, 2) if paired(columns, dtype) else (blocks, columns, BLOCK)

    def pack(self, weight: Tensor, kind: str, out: Tensor, scales: Tensor | None = None) -> None:
        """Transpose block by block; padding rows of the last block are zero. Experts are packed one by one."""
        if kind == "experts":
            for expert, packed in zip(weight, out, strict=True):
                self.pack(expert, "linear", packed, scales)
        elif kind not in MATRICES:
            out.copy_(weight)
        else:
            self._pack_matrix(weight, out, scales)

    def _pack_matrix(self, weight: Tensor, out: Tensor, scales: Tensor | None) -> None:
        rows = weight.shape[0]
        if scales is not None and scales.dim() == 2:
            _pack_int4(weight, scales, out)
            return
        if scales is not None:
            padded = scales.new_zeros(len(out) * BLOCK)
            padded[:rows] = scales
            flat = out.view(len(out), -1)
            flat[:, -SCALE_BYTES:].copy_(padded.view(len(out), BLOCK).view(out.dtype))
            out = out[:, : -(SCALE_BYTES // out[0, 0].numel())]
        full = rows // BLOCK
        if out.dim() == 4:  # two inputs are one element of twice the width
            weight = _pairs(weight.to(out.dtype).contiguous())
            out = _pairs(out)[..., 0]
        blocks = weight[: full * BLOCK].contiguous().view(full, BLOCK, weight.shape[1])
        if weight.shape[1] < WIDE:
            out[:full].copy_(blocks.transpose(1, 2))
        else:
            for packed, block in zip(out, blocks, strict=False):
                packed.copy_(block.t().contiguous())
        if rows % BLOCK:
            out[full].zero_()
            out[full, :, : rows % BLOCK].copy_(weight[full * BLOCK :].t())


class InOutPacking:
    """Matrices as [K, N], those that read the same input as one; embeddings and vectors plain.

    A product contracts the first axis of both operands on a systolic array (Trainium's loads both with the contracted
    axis on its partitions), so no weight is transposed when it is loaded.
    """

    name = "in-out"
    fuses = True

    def turns(self, kind: str) -> bool:
        """Return True for matrices, those of experts too."""
        return kind in ("linear", "experts")

    def packed_shape(self, shape: tuple[int, ...], kind: str, dtype: str) -> tuple[int, ...]:  # noqa: ARG002 - the protocol's
        """Return [K, N] for [N, K] of matrices, and of each expert."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.turns(kind) else shape

    def pack(self, weight: Tensor, kind: str, out: Tensor, scales: Tensor | None = None) -> None:
        """Transpose a matrix, or each expert's; `scales` are unsupported, because int8 weights are the CPU's."""
        assert scales is None
        if self.turns(kind):
            # Torch transposes in tiles, at 2.5 GB/s instead of 0.6, where both are contiguous and of one dtype.
            weight = weight.to(out.dtype).contiguous().transpose(-1, -2)
        out.copy_(weight)


def _pack_int4(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write codes uint8 [N, K] and scales float16 [N, K / 32] to blocks; padding rows stand for zeros."""
    import torch  # not at the top: the plan reads shapes without torch

    more = len(out) * BLOCK - len(codes)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, more)).view(len(out), 2, BLOCK // 2, -1, INT4_GROUP // 2, 2)
    bytes_BGPL2 = (codes[:, 0] | codes[:, 1] << 4).permute(0, 2, 3, 1, 4)
    groups = out.view(*out.shape[:2], -1)
    groups[..., : -2 * BLOCK].view(bytes_BGPL2.shape).copy_(bytes_BGPL2)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, more)).view(len(out), BLOCK, -1).transpose(1, 2)
    groups[..., -2 * BLOCK :].copy_(padded.contiguous().view(torch.uint8))


def unpacked_int4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [N, K] and scales float16 [N, K / 32] of blocks of 4-bit weights, padding rows included."""
    import torch  # not at the top: the plan reads shapes without torch

    count, groups = packed.shape[:2]
    flat = packed.reshape(count, groups, -1)
    bytes_BLGP2 = flat[..., : -2 * BLOCK].view(count, groups, INT4_GROUP // 2, BLOCK // 2, 2).permute(0, 3, 1, 2, 4)
    codes = torch.stack((bytes_BLGP2 & 15, bytes_BLGP2 >> 4), dim=1).reshape(count * BLOCK, -1)
    scales = flat[..., -2 * BLOCK :].contiguous().view(torch.float16).transpose(1, 2)
    return codes, scales.reshape(count * BLOCK, -1)


def paired(columns: int, dtype: str) -> bool:
    """Return whether a block of this dtype stores two inputs adjacently."""
    return dtype in ("bfloat16", "int8") and columns % 2 == 0


def _pairs(values: Tensor) -> Tensor:
    """View two neighbours of the last axis as one integer."""
    import torch  # not at the top: the plan reads shapes without torch

    return values.view({1: torch.int16, 2: torch.int32}[values.element_size()])


PACKINGS: dict[str, Packing] = {"plain": PlainPacking(), "block": BlockPacking(), "in-out": InOutPacking()}
"""Layouts by their name in a backend's settings."""
