"""This backend's seams of a model: products with blocked weights, attention over caches, collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from pipeline.backends.inductor.block_experts import expert_gated, expert_linear
from pipeline.backends.inductor.block_linear import block_linear, block_swiglu
from pipeline.backends.inductor.cached_attention import cached_attention
from pipeline.backends.inductor.collectives import all_gather, all_reduce
from pipeline.backends.inductor.sample_all import sample_all
from pipeline.backends.inductor.subgraphs import SubgraphTracer
from pipeline.graphs.packing import SCALE_BYTES
from pipeline.models.parallel import SWIGLU, Args, Attend, Chosen, Gating, R, Seams
from pipeline.models.weights import BLOCK, INT4_GROUP


class BlockedSeams(Seams):
    """Blocked weights on one rank, summed in float32. With a tracer, subgraphs are compiled once."""

    sample_all: Callable[..., Tensor] | None = staticmethod(sample_all)

    def __init__(self, subgraphs: SubgraphTracer | None = None) -> None:
        self.subgraphs = subgraphs

    def once(self, function: Callable[[*Args], R], *args: *Args) -> R:
        """Call a function through the tracer."""
        if self.subgraphs is None:
            return function(*args)
        result: R = self.subgraphs.call(function, *args)
        return result

    def of_live(self, live_BT: Tensor | None) -> Seams:
        """Return the same, whose products skip tokens that are not live: their results are zeros."""
        same = copy(self)
        same.live = None if live_BT is None else live_BT.contiguous()  # once, not for each subgraph that reads it
        return same

    @property
    def _live(self) -> Tensor | None:
        return None if self.live is None else self.live.reshape(-1).contiguous()

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Multiply by a blocked weight."""
        return self.head(x_BTI, weight, rows).to(x_BTI.dtype)

    def linears(self, x_BTI: Tensor, weights: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Multiply by several blocked weights in one loop."""
        out = block_linear(_flat(x_BTI), weights, self._live).to(x_BTI.dtype).view(*x_BTI.shape[:2], -1)
        padded_rows = [weight.shape[0] * BLOCK for weight in weights]
        if padded_rows == list(rows):
            return out
        parts = out.split(padded_rows, dim=-1)
        return torch.cat([part[..., :count] for part, count in zip(parts, rows, strict=True)], dim=-1)

    def swiglu(self, x_BTI: Tensor, gate: Tensor, up: Tensor, rows: int) -> Tensor:
        """Compute both products and SwiGLU in one loop, rounded once at the end."""
        return block_swiglu(_flat(x_BTI), gate, up, self._live).view(*x_BTI.shape[:2], -1)[..., :rows]

    def experts(
        self, x_BTI: Tensor, chosen: Chosen, matrices: tuple[Tensor, ...], gating: Gating = SWIGLU
    ) -> Tensor:  # fmt: skip
        """Multiply each token by the blocked matrices of its experts, which are read once for all their tokens.

        Tokens that are not live have none.
        """
        gate, up, down = matrices
        x_MI, numbers_MC = _flat(x_BTI), chosen.experts.flatten(0, 1).int().contiguous()
        if self.live is not None:
            numbers_MC = torch.where(self.live.reshape(-1, 1), numbers_MC, torch.full_like(numbers_MC, -1))
        bounds = () if gating.clamp is None else (gating.clamp.limit, gating.clamp.alpha)
        is_gelu = gating.activation == "gelu_tanh"
        inner_MCN = expert_gated(x_MI, numbers_MC, gate, up, list(gating.biases or ()), list(bounds), is_gelu)
        out_MCI = expert_linear(inner_MCN[..., : _inputs(down)].contiguous(), numbers_MC, down)[..., : x_BTI.shape[-1]]
        out_MI = (out_MCI * chosen.shares.flatten(0, 1)[..., None]).sum(dim=1)
        return out_MI.to(x_BTI.dtype).view(x_BTI.shape)

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Multiply by a blocked weight, with a float32 result."""
        return block_linear(_flat(x_BTI), [weight], self._live).view(*x_BTI.shape[:2], -1)[..., :rows]

    def attend(self, q_BNTD: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attend over caches, up to the last key that each query sees."""
        if not attend.kv:
            return super().attend(q_BNTD, k, v, attend)
        batch, heads, tokens, dim = q_BNTD.shape
        last_BT = attend.last_BT.int().expand(batch, tokens).contiguous()
        q = q_BNTD.float() if attend.scale is None else q_BNTD.float() * (attend.scale * dim**0.5)
        how = {"window": attend.window, "cap": attend.cap, "ring": attend.ring}
        tensors = {} if attend.sinks_N is None else {"sinks": attend.sinks_N.float()}
        tensors |= {} if attend.rows_B is None else {"rows": attend.rows_B.int().contiguous()}
        given = {name: value for name, value in how.items() if value is not None}
        out = cached_attention(q.contiguous(), k, v, last_BT, attend.kv, **given, **tensors)
        return out.to(q_BNTD.dtype).view(batch, tokens, heads * dim)

    def embed(self, ids_BT: Tensor, weight: Tensor) -> Tensor:
        """Look up rows of a blocked table: row r is lane r % 32 of block r // 32."""
        ids = ids_BT.long()
        rows = weight[ids // BLOCK, :, ids % BLOCK].reshape(*ids.shape, -1)
        if weight.dtype != torch.int8:
            return rows
        return rows[..., : -SCALE_BYTES // BLOCK].float() * _scales(ids, weight)[..., None]


def _inputs(weight: Tensor) -> int:
    """Return the input features of blocked experts."""
    if weight.dtype == torch.uint8:
        return weight.shape[2] * INT4_GROUP
    scales = SCALE_BYTES // BLOCK if weight.dtype == torch.int8 else 0
    return math.prod(weight.shape[2:]) // BLOCK - scales


def _flat(x_BTI: Tensor) -> Tensor:
    return x_BTI.reshape(-1, x_BTI.shape[-1]).contiguous()


def _scales(ids_BT: Tensor, weight: Tensor) -> Tensor:
    """Return the scales of rows of a blocked int8 table, float32 [B, T], assembled from four bytes each."""
    bytes_BTL4 = weight.view(len(weight), -1)[:, -SCALE_BYTES:][ids_BT // BLOCK].view(*ids_BT.shape, BLOCK, 4)
    index = (ids_BT % BLOCK)[..., None, None].expand(*ids_BT.shape, 1, 4)
    low_to_high = bytes_BTL4.gather(-2, index)[..., 0, :].int() & 0xFF
    first, second, third, fourth = low_to_high.unbind(-1)
    return (first | second << 8 | third << 16 | fourth << 24).view(torch.float32)


class RankedSeams(BlockedSeams):
    """Blocked weights, split over `tp` ranks; sums and gathers are operators inside the graph or its subgraphs."""

    def __init__(self, tp: int, subgraphs: SubgraphTracer | None = None) -> None:
        super().__init__(subgraphs)
        self.tp = tp

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks."""
        return all_gather(x, self.tp).movedim(0, -2).reshape(*x.shape[:-1], -1)


class PlainRankedSeams(RankedSeams):
    """Plain weights, split over ranks (CUDA)."""

    of_live = Seams.of_live
    linear = Seams.linear
    linears = Seams.linears
    swiglu = Seams.swiglu
    head = Seams.head
    embed = Seams.embed
    experts = Seams.experts
    attend = Seams.attend
    sample_all = None
