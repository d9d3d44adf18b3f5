"""Round weights to 4 bits: one float16 scale for 32 inputs of an output feature, as GGML's Q4_0.

Source: llama.cpp, `ggml/src/ggml-quants.c`. The sharder, references and kernels use this definition:
`w = (code - 8) * scale`, codes 0 to 15, with `scale` the value of largest magnitude of the 32 over -8. That value is
exact then, up to float16. Activations and sums stay float32.

Shapes: N output features, I input features, a multiple of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.weights import INT4_GROUP

LARGEST = 8


def quantise(weight_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight as codes, uint8 [N, I], and float16 scales [N, I / 32]; 32 zeros have the scale 0."""
    groups = weight_NI.float().view(len(weight_NI), -1, INT4_GROUP)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scales = (largest / -LARGEST).to(torch.float16)
    steps = torch.where(scales != 0, scales, torch.ones_like(scales)).float()
    codes = (torch.round(groups / steps) + LARGEST).clamp(0, 2 * LARGEST - 1)
    return codes.to(torch.uint8).view(weight_NI.shape), scales[..., 0]


def dequantised(codes_NI: Tensor, scales_NG: Tensor) -> Tensor:
    """Return the values of codes, float32 [N, I]."""
    values = codes_NI.float().view(*scales_NG.shape, INT4_GROUP) - LARGEST
    return (values * scales_NG.float()[..., None]).view(codes_NI.shape)


def rounded(weight_NI: Tensor) -> Tensor:
    """Return the values that a weight has after rounding to 4 bits, float32 [N, I]."""
    return dequantised(*quantise(weight_NI))
