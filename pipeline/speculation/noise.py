"""Random numbers inside a graph: Gumbel noise that is a function of a request's seed, a position and a token id.

A counter-based generator (Salmon et al. 2011) with the round function of the block cipher SIMON (Beaulieu et al. 2013),
which needs shifts, AND and XOR only: these are exact on every backend, integer products are not.

Shapes: M rows, each with a position, N token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 16
"""Twelve leave correlations that a test of two million numbers sees; fourteen leave none."""

BITS = 23
"""Bits of a word that a float32 holds exactly, with a half between them."""

LARGEST = 1 - 2.0**-24
"""The largest float32 below 1."""


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


CONSTANTS = tuple(_int32(0x9E3779B9 * number) for number in range(1, ROUNDS + 1))
"""A constant for each round: multiples of the golden ratio."""


def gumbel(seed_M2: Tensor, position_M: Tensor, ids: Tensor) -> Tensor:
    """Return independent standard Gumbel numbers, float32 [M, N], for ids int [N] or [M, N]; seeds are int32."""
    high, low = words(seed_M2[:, None], position_M[:, None], ids)
    uniform = ((high + (low + 0.5) * 2.0**-BITS) * 2.0**-BITS).clamp(max=LARGEST)
    small = uniform * (1 + uniform * (0.5 + uniform / 3))
    is_small = uniform < torch.full_like(uniform, 1e-2)  # a tensor: XLA would compare with a number in float64
    exponential = torch.where(is_small, small, -torch.log(1 - uniform))
    return -torch.log(exponential)


def words(seed: Tensor, positions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return two words of `BITS` random bits each, float32, of the shape that positions and ids broadcast to.

    `seed` has two int32 words on its last axis.
    """
    x, y = torch.broadcast_tensors(ids.int(), positions.int())
    for number, constant in enumerate(CONSTANTS):
        key = seed[..., number % 2] ^ constant
        x, y = y ^ (_rotated(x, 1) & _rotated(x, 8)) ^ _rotated(x, 2) ^ key, x
    return _top_bits(x), _top_bits(y)


def _rotated(x: Tensor, bits: int) -> Tensor:
    """Rotate int32 to the left."""
    return (x << bits) ^ ((x >> (32 - bits)) & ((1 << bits) - 1))


def _top_bits(x: Tensor) -> Tensor:
    return ((x >> (32 - BITS)) & ((1 << BITS) - 1)).float()
