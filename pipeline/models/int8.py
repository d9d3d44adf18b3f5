"""Round weights to int8: one scale per output feature, symmetric, round to nearest even.

Sharder, references and kernels use this definition: `w = q * scale`, with `scale` the row's largest magnitude over
127. Activations and sums stay float32.

Shapes: N output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantise(weight_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight as int8 [N, I] and float32 scales [N]; a row of zeros has the scale 0."""
    wide_NI = weight_NI.float()
    scale_N = wide_NI.abs().amax(dim=1) / LARGEST
    steps_N = torch.where(scale_N > 0, scale_N, torch.ones_like(scale_N))
    return torch.round(wide_NI / steps_N[:, None]).to(torch.int8), scale_N


def rounded(weight_NI: Tensor) -> Tensor:
    """Return the values that a weight has after rounding to int8, float32 [N, I]."""
    int8_NI, scale_N = quantise(weight_NI)
    return int8_NI.float() * scale_N[:, None]
