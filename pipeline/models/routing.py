"""The router of a layer with experts: which ones each token uses, and their shares. Pure functions.

Shapes: B rows, T tokens, H hidden, E experts, C experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.config import Experts
from pipeline.models.parallel import Chosen, Seams


def routed(experts: Experts, w: Mapping[str, Tensor], seams: Seams, x_BTH: Tensor) -> Chosen:
    """Choose the experts of each token by the router's scores, and their shares."""
    if experts.bias:  # in float32: rounded twice, more scores would be equal
        scores_BTE = seams.head(x_BTH, w["mlp.gate.weight"], experts.count) + w["mlp.gate.bias"].float()
    else:
        scores_BTE = seams.linear(x_BTH, w["mlp.gate.weight"], experts.count).float()
    if experts.among:
        scores_BTC, chosen = seams.top(scores_BTE, experts.chosen)
        return Chosen(chosen, torch.softmax(scores_BTC, dim=-1))
    shares, chosen = seams.top(torch.softmax(scores_BTE, dim=-1), experts.chosen)
    return Chosen(chosen, shares)


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
