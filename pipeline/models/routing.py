"""The router of a layer with experts: which ones each token uses, and their shares. Pure functions.

Shapes: B rows, T tokens, H hidden, E experts, C experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.config import Experts
from pipeline.models.norms import normalised
from pipeline.models.parallel import Chosen, Gating, Seams


def routed(experts: Experts, w: Mapping[str, Tensor], seams: Seams, x_BTH: Tensor) -> Chosen:
    """Choose the experts of each token by the router's scores, and their shares."""
    if experts.bias:  # in float32: rounded twice, more scores would be equal
        scores_BTE = seams.head(x_BTH, w["mlp.gate.weight"], experts.count) + w["mlp.gate.bias"].float()
    else:
        scores_BTE = seams.linear(x_BTH, w["mlp.gate.weight"], experts.count).float()
    if experts.by_input:
        scores_BTC, chosen = seams.top(scores_BTE, experts.chosen)
        return Chosen(chosen, torch.sigmoid(scores_BTC))
    if experts.among:
        scores_BTC, chosen = seams.top(scores_BTE, experts.chosen)
        shares_BTC = torch.softmax(scores_BTC, dim=-1)
        return Chosen(chosen, shares_BTC * w["mlp.gate.per_expert_scale"][chosen] if experts.scaled else shares_BTC)
    shares, chosen = seams.top(torch.softmax(scores_BTE, dim=-1), experts.chosen)
    return Chosen(chosen, shares)


def router_input(w: Mapping[str, Tensor], x_BTH: Tensor, eps: float) -> Tensor:
    """Return what a `scaled` router reads: the stream, normalised, times a vector and 1 / sqrt(H): [B, T, H]."""
    return normalised(x_BTH, eps).to(x_BTH.dtype) * w["mlp.gate.scale"] * x_BTH.shape[-1] ** -0.5


def mixed(
    experts: Experts, seams: Seams, x_BTH: Tensor, chosen: Chosen, matrices: tuple[Tensor, ...], gating: Gating
) -> Tensor:
    """Return the sum of the chosen experts' outputs by their shares, or of those of inputs by their shares: [B, T, H].

    `matrices` are as in `Seams.experts`.
    """
    if not experts.by_input:
        return seams.experts(x_BTH, chosen, matrices, gating)
    outs = []
    for place in range(experts.chosen):
        numbers_BT1, shares_BT1 = (of[..., place, None] for of in (chosen.experts, chosen.shares))
        # What an expert of another rank adds: its share is 0, and so are its input and its output.
        one = Chosen(numbers_BT1, torch.ones_like(shares_BT1), chosen.elsewhere)
        outs.append(seams.experts(x_BTH * shares_BT1.to(x_BTH.dtype), one, matrices, gating))
    return sum(outs[1:], outs[0])


def of_rank(experts: Experts, chosen: Chosen, seams: Seams, rank_1: Tensor) -> Chosen:
    """Return the chosen experts that stand on this rank, by their numbers there; `rank_1` int [1] is its number."""
    own = experts.count // seams.tp
    numbers_BTC = chosen.experts - rank_1 * own
    is_own_BTC = (numbers_BTC >= 0) & (numbers_BTC < own)
    numbers_BTC = torch.where(is_own_BTC, numbers_BTC, torch.full_like(numbers_BTC, -1))
    shares_BTC = torch.where(is_own_BTC, chosen.shares, torch.zeros_like(chosen.shares))
    return Chosen(numbers_BTC, shares_BTC, elsewhere=True)


def shared_out(biases_EH: Tensor, chosen: Chosen) -> Tensor:
    """Return the sum of the chosen experts' biases by their shares, float32 [B, T, H]: the same on every rank."""
    return (biases_EH[chosen.experts].float() * chosen.shares[..., None]).sum(dim=-2)
