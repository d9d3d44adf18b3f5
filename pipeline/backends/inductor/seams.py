"""What this backend fills the models' seams with: products with blocked weights, and collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.backends.inductor.block_linear import block_linear
from pipeline.backends.inductor.collectives import all_gather, all_reduce
from pipeline.backends.packing import SCALE_ROWS
from pipeline.models.parallel import Seams


class BlockedSeams(Seams):
    """Blocked weights on one rank, summed in float32."""

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Product with a blocked weight [N/32, I, 32]."""
        return self.head(x_BTI, weight, rows).to(x_BTI.dtype)

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """The same, left in float32."""
        batch, tokens, inputs = x_BTI.shape
        out = block_linear(x_BTI.float().reshape(batch * tokens, inputs), weight)
        return out.view(batch, tokens, -1)[..., :rows]

    def embed(self, ids_BT: Tensor, weight: Tensor) -> Tensor:
        """Rows of a blocked table: row r is lane r % 32 of block r // 32."""
        ids, lanes = ids_BT.long(), weight.shape[-1]
        rows = weight[ids // lanes, :, ids % lanes]
        return rows if weight.dtype != torch.int8 else rows[..., :-SCALE_ROWS].float() * _scales(ids, weight)[..., None]


def _scales(ids_BT: Tensor, weight: Tensor) -> Tensor:
    """Scales of some rows of a blocked int8 table, float32 [B, T], put together from their four bytes each."""
    lanes = weight.shape[-1]
    bytes_BTL4 = weight[ids_BT // lanes, -SCALE_ROWS:].reshape(*ids_BT.shape, lanes, 4)
    index = (ids_BT % lanes)[..., None, None].expand(*ids_BT.shape, 1, 4)
    low_to_high = bytes_BTL4.gather(-2, index)[..., 0, :].int() & 0xFF
    first, second, third, fourth = low_to_high.unbind(-1)
    return (first | second << 8 | third << 16 | fourth << 24).view(torch.float32)


class RankedSeams(BlockedSeams):
    """Blocked weights, split over `tp` ranks; sums and gathers are operators inside the graph."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks."""
        return all_gather(x, self.tp).movedim(0, -2).reshape(*x.shape[:-1], -1)


class PlainRankedSeams(RankedSeams):
    """Plain weights, split over ranks (CUDA)."""

    linear = Seams.linear
    head = Seams.head
    embed = Seams.embed
