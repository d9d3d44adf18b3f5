"""The limits of the parity gate, and their reasons. Imports no torch.

Ratios are errors over the noise of the recipe's dtype. They are set from correct builds and planted faults: correct
builds are near 1 for every seed, faults above (`benchmarks/fault_rates.py`, `docs/results.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ATOL = 1e-5
MAP = {5: 0.011, 50: 0.02, 1000: 0.03}
"""Relative tolerance of the largest error among the baseline's top k."""

MAP_ALL = 0.05
"""The same for the root mean square error over the whole vocabulary."""

FLIP_LIMIT = 1.5
"""Near-ties that may flip, over those that transformers flips itself."""

FLIP_SPREAD = 2.0
"""Standard deviations by which the two counts, which are those of rare events, may differ besides."""


def most_near_ties(count: int, usual: int, near_tie_rate: float) -> float:
    """Return how many of `count` choices may be near-ties, of which transformers has `usual`."""
    return near_tie_rate * count + FLIP_LIMIT * usual + FLIP_SPREAD * math.sqrt(usual + 1)


@dataclass(frozen=True)
class Limits:
    """Errors over noise: root mean squares over all tokens, over a slice, over a layer's keys or values, over tokens of
    an expert; and a token's largest, over the larger of its own noise and the median.
    """  # fmt: skip

    all: float
    slice: float
    layer: float
    expert: float
    token: float


NARROW = Limits(all=1.5, slice=2.5, layer=1.5, expert=1.8, token=12.0)
"""bfloat16 and float16, where rounding of stored values dominates, equal in every correct build."""

WIDE = Limits(all=4.0, slice=6.0, layer=4.0, expert=5.0, token=30.0)
"""float32, where the order of sums dominates, which depends on the kernel; faults are a hundred times larger."""


def limits(dtype: str) -> Limits:
    """Return the limits of a dtype."""
    return WIDE if dtype == "float32" else NARROW


SLICE_TOKENS = 16
"""Least tokens of a slice that is compared as a whole; smaller ones are compared token by token."""

EXPERT_TOKENS = 48
"""Least tokens of an expert whose error is compared as a whole."""

TIE = 4.0
"""A gap between two logits is a near-tie within this many times the noise of the largest logits there."""

ROUTER_TIE = 8.0
"""A gap between two scores of a router is a near-tie within this many times the noise of its scores there."""

AFTER_ROUTER_TIES = 0.02
"""Share of tokens that may differ from every reference after a near-tie of a router."""
