"""Right seams that round elsewhere than transformers: products in float32, SwiGLU and experts rounded once.

The kernels of a compiled artifact round so. What plain seams compute is, bit for bit, nearly what transformers does, so
they show neither near-ties that the two decide differently nor how far two right results are apart.

Shapes: M tokens, C experts of each, E experts, I input features, N output features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.parallel import SWIGLU, Attend, Chosen, Gating, Seams
from support.eager import EagerRanks


class WideSeams(Seams):
    """Seams of one rank that compute in float32 and round results."""

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        return functional.linear(x_BTI.float(), weight.float())[..., :rows].to(x_BTI.dtype)

    def swiglu(self, x_BTI: Tensor, gate: Tensor, up: Tensor, rows: int) -> Tensor:
        x = x_BTI.float()
        inner = functional.silu(functional.linear(x, gate.float())) * functional.linear(x, up.float())
        return inner[..., :rows].to(x_BTI.dtype)

    def experts(
        self, x_BTI: Tensor, chosen: Chosen, matrices: tuple[Tensor, ...], gating: Gating = SWIGLU
    ) -> Tensor:  # fmt: skip
        gate, up, down = (matrix.float() for matrix in matrices)
        if gating.biases is not None:
            gating = replace(gating, biases=(gating.biases[0].float(), gating.biases[1].float()))
        x_MI, ids_MC = x_BTI.flatten(0, 1).float(), chosen.experts.flatten(0, 1)
        products = (torch.einsum("mi,eni->emn", x_MI, weight) for weight in (gate, up))
        inner_EMN = gating.of(*products).to(x_BTI.dtype).float()
        out_MEI = torch.einsum("emn,ein->mei", inner_EMN, down)
        of_tokens = out_MEI.gather(1, ids_MC[..., None].expand(-1, -1, out_MEI.shape[-1]))
        summed_MI = (of_tokens * chosen.shares.flatten(0, 1)[..., None]).sum(dim=1)
        return summed_MI.to(x_BTI.dtype).view(x_BTI.shape)

    def attend(self, q_BNTD: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return super().attend(q_BNTD.float(), k.float(), v.float(), attend).to(q_BNTD.dtype)


def other_rounding(ranks: EagerRanks, seed: int) -> None:
    """No fault: graphs are computed by `WideSeams`."""
    ranks.seams = lambda tp: WideSeams()
