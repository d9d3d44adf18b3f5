"""Numbers of each token: the artifact's logits against baseline and noise, one column per quantity.

Shapes: T tokens, N recorded ids, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.graphs.dtypes import torch_dtype
from pipeline.validate.limits import ATOL, MAP
from pipeline.validate.reference.golden import Golden, Summary


def token_columns(got: Summary, golden: Golden, dtype: str) -> dict[str, Tensor]:
    """Return float64 columns, a row a token, of one sequence in one graph."""
    base, noise = golden.baseline, golden.noise
    error_TN, noise_TN = (got.values.double() - base.values).abs(), (noise.values.double() - base.values).abs()
    largest_T1 = base.values.abs().amax(-1, keepdim=True).double().clamp(min=1e-30)
    vocab_error, vocab_noise = _vocabulary(got, base), _vocabulary(noise, base)
    columns = {
        "allowed": ATOL / largest_T1[:, 0],
        "finite": (torch.isfinite(got.values).all(-1) & torch.isfinite(got.lse)).double(),
        "square_error_top": error_TN.pow(2).mean(-1), "square_noise_top": noise_TN.pow(2).mean(-1),
        "square_error_all": vocab_error, "square_noise_all": vocab_noise,
        "error_all": vocab_error.sqrt() / largest_T1[:, 0], "noise_all": vocab_noise.sqrt() / largest_T1[:, 0],
        "sigma_ratio": error_TN.std(-1, correction=0) / noise_TN.std(-1, correction=0).clamp(min=1e-300),
        "kl": _kl(base, got), "kl_noise": _kl(base, noise), "bhattacharyya": _bhattacharyya(base, got),
    }  # fmt: skip
    for k in MAP:
        size = k if k < 1000 else error_TN.shape[-1]
        for name, value in (("error", error_TN), ("noise", noise_TN)):
            columns[f"{name}_{k}"] = (value[:, :size] / largest_T1).amax(-1)
    return columns | _top(got, golden, dtype)


def _top(got: Summary, golden: Golden, dtype: str) -> dict[str, Tensor]:
    """Return flipped argmaxes, and gaps of the baseline: top-1 to top-2, and top-1 to the artifact's choice."""
    base = golden.baseline
    first = base.values[:, 0].double()
    gap = first - base.values[:, 1].double() if base.values.shape[1] > 1 else torch.full_like(first, torch.inf)
    chosen = golden.ids == got.best[:, None]
    known = chosen.any(-1)
    value = base.values.double().gather(-1, chosen.long().argmax(-1, keepdim=True))[:, 0]
    gap_chosen = torch.where(known, first - value, torch.inf) / base.values.double().abs().amax(-1).clamp(min=1e-30)
    return {
        "flip": (got.best != base.best).double(),
        "flip_noise": (golden.noise.best != base.best).double(),
        "gap": gap,
        "gap_ulp": gap / ulp(first, dtype),
        "gap_chosen": gap_chosen,
        "chosen": got.best.double(),
        "expected": base.best.double(),
    }


def gap_of(golden: Golden, at: int, token: int) -> float:
    """Return the gap of the baseline's choice to a token, relative to the largest logit; 0 for the choice itself."""
    values = golden.baseline.values[at].double()
    known = (golden.ids[at] == token).nonzero()
    if not len(known):
        return float("inf")
    return float((values[0] - values[int(known[0])]) / values.abs().max())


def noise_at(golden: Golden, at: int) -> float:
    """Return the noise of the largest logits at a position, relative to the largest."""
    base, noise = golden.baseline.values[at].double(), golden.noise.values[at].double()
    return float((noise - base)[:5].abs().max() / base.abs().max())


def ulp(values: Tensor, dtype: str) -> Tensor:
    """Return the distance of neighbouring numbers of `dtype` at these magnitudes."""
    exponent = torch.floor(torch.log2(values.abs().clamp(min=torch.finfo(torch.float32).tiny)))
    return torch.exp2(exponent) * torch.finfo(torch_dtype(dtype)).eps


def _vocabulary(part: Summary, other: Summary) -> Tensor:
    """Return the mean square difference over the whole vocabulary [T], by projection."""
    return (part.projected - other.projected).pow(2).sum(-1)


def _probabilities(part: Summary) -> Tensor:
    """Return probabilities of the recorded ids and, last, of all others together: [T, N + 1]."""
    probs = (part.values.double() - part.lse.double()[:, None]).exp()
    rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((probs, rest), dim=-1)


def _kl(base: Summary, other: Summary) -> Tensor:
    """Return the Kullback-Leibler divergence over recorded ids and the rest, in nats."""
    p, q = _probabilities(base), _probabilities(other)
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum(-1).clamp(min=0)


def _bhattacharyya(base: Summary, other: Summary) -> Tensor:
    return (_probabilities(base) * _probabilities(other)).sqrt().sum(-1).clamp(max=1)
