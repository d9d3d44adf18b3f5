"""Errors by expert: of tokens that used it, in the keys and values of the next layer, or the last layer's logits.

One wrong expert of many spoils few tokens, and its error would vanish in the mean of all.

Shapes: T tokens of a run, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.config import ModelConfig
from pipeline.validate.gates.experts import ChosenExperts
from pipeline.validate.limits import EXPERT_TOKENS
from pipeline.validate.report.schema import OfExpert


@dataclass(frozen=True)
class ExpertSquares:
    """Sums of squares by expert, float64 [error or noise, L, E, key or value], and tokens, int64 [L, E].

    `layers` are the layers with experts.
    """

    squares: Tensor
    tokens: Tensor
    layers: tuple[int, ...]


def expert_squares(
    cached_2TK2: Tensor, logits_2T: Tensor, chosen: ChosenExperts | None, config: ModelConfig
) -> ExpertSquares | None:
    """Return the sums of one run; None without experts.

    `cached_2TK2` float64 are squares of error and noise of K layers' keys and values at each token, `logits_2T` those
    of the logits.
    """
    if chosen is None or chosen.fault:
        return None
    layers = tuple(layer for layer in range(config.layers) if config.layer(layer).experts)
    of_logits = logits_2T[:, :, None, None].expand(-1, -1, 1, 2)
    after_2TL2 = torch.cat((cached_2TK2, of_logits), dim=2)[:, :, [layer + 1 for layer in layers]]
    used_TLE = functional.one_hot(chosen.experts.long(), config.expert_layers[0].count).sum(dim=2)
    return ExpertSquares(torch.einsum("ptls,tle->ples", after_2TL2, used_TLE.double()), used_TLE.sum(0), layers)


@dataclass(frozen=True)
class ComparedExperts:
    """How many experts were compared, those that enough tokens used, and the one with the largest error over noise."""

    count: int = 0
    worst: OfExpert | None = None


def compared_experts(runs: Sequence[ExpertSquares | None]) -> ComparedExperts:
    """Return the experts that enough tokens of all runs used."""
    found = [run for run in runs if run is not None]
    if not found:
        return ComparedExperts()
    squares, tokens = (sum(parts[1:], parts[0]) for parts in ([r.squares for r in found], [r.tokens for r in found]))
    ratios_LE = (squares[0] / squares[1].clamp(min=1e-300)).sqrt().amax(-1)
    is_used_LE = tokens >= EXPERT_TOKENS
    if not bool(is_used_LE.any()):
        return ComparedExperts()
    layer, expert = divmod(int(torch.where(is_used_LE, ratios_LE, -1.0).argmax()), ratios_LE.shape[1])
    worst = OfExpert(
        layer=found[0].layers[layer],
        expert=expert,
        tokens=int(tokens[layer, expert]),
        error_over_noise=float(ratios_LE[layer, expert]),
    )
    return ComparedExperts(int(is_used_LE.sum()), worst)
