"""The experts that a reference run follows: its own choices, or given ones, and how near each choice is to a tie.

A router whose scores of two experts differ by less than rounding chooses either, and the token's states then differ far
beyond rounding. So both precisions of a reference follow the same experts: noise is rounding alone. Given experts are
those of an artifact, which then differs from the reference by rounding, too; each of its choices that is not the
baseline's must be nearly one. Judges nothing.

Shapes: T tokens of a sequence, L layers with experts, C experts of a token, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CHOOSE = {torch.topk, Tensor.topk}
"""How every router of transformers chooses experts: nothing else in a layer does."""


@dataclass(frozen=True)
class Routes:
    """The experts of a sequence, and the routers' scores around them, as logarithms of shares.

    `experts` int16 [T, L, C] ascend. `gaps`, float32 [T, L], are the baseline's best score among the other experts
    minus its worst among these: negative where it chooses the same, and then the distance to another choice. `noise`,
    float32 [T, L], is the largest difference of a score between the two precisions; `flips_of_noise`, bool [T, L], says
    where their own choices differ.
    """  # fmt: skip

    experts: Tensor
    gaps: Tensor
    noise: Tensor
    flips_of_noise: Tensor

    def cut(self, tokens: int) -> Routes:
        """Return the first tokens only."""
        return Routes(*(tensor[:tokens] for tensor in vars(self).values()))


def digest(experts_TLC: Tensor | None) -> str:
    """Return a text that is equal for equal given experts."""
    if experts_TLC is None:
        return ""
    data = experts_TLC.to(torch.int16).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(experts_TLC.shape)}".encode() + data).hexdigest()


class Router(TorchFunctionMode):
    """Within it, the routers of layers choose the experts of one sequence: given ones, or those of the baseline.

    Each layer runs twice within it, as the baseline and as noise. `given` int [T, L, C].
    """

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self._given = None if given is None else given.long()
        self._baseline: Tensor | None = None
        self._layers: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Choose experts where a router does; leave everything else as it is."""
        return (self._choose if func in CHOOSE else func)(*args, **(kwargs or {}))

    def _choose(self, scores_TE: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the last one
        wide_TE = log_shares(scores_TE)
        if self._baseline is None:
            self._baseline = wide_TE
            own_TC = scores_TE.topk(k).indices
            chosen_TC = own_TC if self._given is None else self._given[:, len(self._layers)]
            self._layers.append((chosen_TC.sort(dim=-1).values,))
        else:
            (chosen_TC,) = self._layers[-1]
            self._layers[-1] = (chosen_TC, *_around(self._baseline, wide_TE, chosen_TC))
            self._baseline = None
        return scores_TE.gather(-1, chosen_TC), chosen_TC

    def routes(self) -> Routes | None:
        """Return the experts of all layers; None without layers that have experts."""
        if not self._layers:
            return None
        experts, gaps, noise, flips = (torch.stack(parts, dim=1) for parts in zip(*self._layers, strict=True))
        return Routes(experts.to(torch.int16), gaps.float(), noise.float(), flips)


def log_shares(scores_TE: Tensor) -> Tensor:
    """Return a router's scores as logarithms of shares, float64: some choose by these, others by shares or logits."""
    wide_TE = scores_TE.double()
    are_shares = bool((wide_TE >= 0).all()) and bool(((wide_TE.sum(-1) - 1).abs() < 1e-2).all())
    if are_shares:
        return wide_TE.clamp(min=torch.finfo(torch.float32).tiny).log()
    return torch.log_softmax(wide_TE, dim=-1)


def _around(baseline_TE: Tensor, noise_TE: Tensor, chosen_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gaps, noise and flips of noise of one layer."""
    inside_TE = torch.zeros_like(baseline_TE, dtype=torch.bool).scatter(-1, chosen_TC, True)
    worst_T = baseline_TE.masked_fill(~inside_TE, torch.inf).amin(-1)
    gaps_T = baseline_TE.masked_fill(inside_TE, -torch.inf).amax(-1) - worst_T
    own = [scores.topk(chosen_TC.shape[-1]).indices.sort(dim=-1).values for scores in (baseline_TE, noise_TE)]
    return gaps_T, (noise_TE - baseline_TE).abs().amax(-1), (own[0] != own[1]).any(-1)
