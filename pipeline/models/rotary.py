"""The rotary embedding (Su et al. 2021) of queries and keys, as `rope.py` reads it from a config. Pure functions.

Shapes: B rows, T tokens, N heads, D head size, R values of a head that turn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.rope_types import DividedRope, LinearRope, Llama3Rope, ProportionalRope, Rope, YarnRope


class Rotary(NamedTuple):
    """Cos and sin of the rotary embedding, [B, 1, T, R] for the first R values of each head."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def rotary_of(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype, kind: int = 0) -> Rotary | None:
    """Return the rotary embedding of a kind of layers (Su et al. 2021), angles in float32; None without positions."""
    rope = config.kinds[kind].rope
    if rope is None:
        return None
    angles = positions_BT.float()[:, None, :, None] * rotary_frequencies(rope, positions_BT.device)
    angles = torch.stack((angles, angles), dim=-1).flatten(-2) if rope.interleaved else torch.cat((angles, angles), -1)
    cos, sin = angles.cos(), angles.sin()
    if rope.scale != 1:
        cos, sin = cos * rope.scale, sin * rope.scale
    return Rotary(cos.to(dtype), sin.to(dtype), rope.interleaved)


def rotary_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Return the angle by which each pair of a head's values turns per position: float32 [D / 2]."""
    exponents = torch.arange(0, rope.dim, 2, device=device).float() / rope.dim
    # exp instead of theta ** x: not every compiler supports a power with a varying exponent.
    frequencies = torch.exp(exponents * -math.log(rope.theta))
    match rope.scaling:
        case LinearRope():
            return frequencies / rope.scaling.factor
        case Llama3Rope():
            return _scale_llama3(frequencies, rope.scaling)
        case YarnRope():
            return _scale_yarn(frequencies, rope.scaling)
        case ProportionalRope():
            turning = torch.arange(len(frequencies), device=device) < rope.scaling.pairs
            return torch.where(turning, frequencies / rope.scaling.factor, 0.0)
        case DividedRope():
            parts = [torch.full((1,), factor, device=device) for factor in rope.scaling.factors]
            return frequencies / torch.cat(parts)  # a graph holds no constants but numbers
    return frequencies


def _scale_llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Scale as Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between them.

    Llama 4 Scout has none between: both factors are 1.
    """
    wavelength = 2 * math.pi / frequencies
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    width = rope.high_freq_factor - rope.low_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / width if width else 0.0
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    # Limits as tensors: XLA would compare with a Python number in float64.
    scaled = torch.where(wavelength > torch.full_like(wavelength, low), frequencies / rope.factor, between)
    return torch.where(wavelength < torch.full_like(wavelength, high), frequencies, scaled)


def _scale_yarn(frequencies: Tensor, rope: YarnRope) -> Tensor:
    """Scale as YaRN: keep high frequencies, divide low ones by `factor`, mix linearly between the two pairs."""
    pairs = torch.arange(len(frequencies), device=frequencies.device).float()
    divided = ((pairs - rope.first) / (rope.last - rope.first)).clamp(0, 1)
    return frequencies / rope.factor * divided + frequencies * (1 - divided)


def rotate(x_BNTD: Tensor, rotary: Rotary | None) -> Tensor:
    """Apply the rotary embedding to the first values of each head: [B, N, T, D]."""
    if rotary is None:
        return x_BNTD
    dim = rotary.cos.shape[-1]
    x, rest = (x_BNTD, None) if dim == x_BNTD.shape[-1] else x_BNTD.split((dim, x_BNTD.shape[-1] - dim), dim=-1)
    if rotary.interleaved:
        first, second = x.unflatten(-1, (dim // 2, 2)).unbind(-1)
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    out = x * rotary.cos + turned * rotary.sin
    return out if rest is None else torch.cat((out, rest), dim=-1)
