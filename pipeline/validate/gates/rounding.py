"""What storing weights as int8 changed: the reference with rounded weights against the reference with the dtype's own.

Parity asks whether the artifact computes what its int8 weights stand for. This asks how far those are from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.validate.reference.goldens import Golden


def rounding(rounded: Sequence[Golden], whole: Sequence[Golden]) -> dict[str, Any]:
    """Figures over all tokens of the same sequences, for the report: see `report.Rounding`."""
    pairs = list(zip(rounded, whole, strict=True))
    same = torch.cat([r.baseline.best == w.baseline.best for r, w in pairs])
    error, noise = (
        torch.cat([(other(r, w) - w.baseline.projected).pow(2).sum(-1) for r, w in pairs]).mean().sqrt()
        for other in (lambda r, _: r.baseline.projected, lambda _, w: w.noise.projected)
    )
    return {
        "tokens": len(same),
        "same_choice": float(same.double().mean()),
        "same_choice_of_noise": float(torch.cat([w.noise.best == w.baseline.best for _, w in pairs]).double().mean()),
        "logit_error": float(error),
        "logit_noise": float(noise),
    }
