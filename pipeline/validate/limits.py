"""The bounds of the parity gate, and why they are what they are. No torch.

Ratios are errors over the noise of the recipe's dtype. They are set from clean builds and planted faults: right builds
lie near 1 whatever the seed, faults above (`benchmarks/fault_rates.py`, `docs/results.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

ATOL = 1e-5
MAP = {5: 0.011, 50: 0.02, 1000: 0.03}
"""Relative tolerance of the largest error among the baseline's top k."""

MAP_ALL = 0.05
"""The same for the root mean square error over the whole vocabulary."""

FLIP_LIMIT = 1.5
"""Near-ties that may flip, over those that transformers flips itself."""


@dataclass(frozen=True)
class Limits:
    """Errors over noise: root mean squares over all tokens, over a slice, over a layer's keys or values; and a token's
    largest, over the larger of its own noise and the median.
    """  # fmt: skip

    all: float
    slice: float
    layer: float
    token: float


NARROW = Limits(all=1.5, slice=2.5, layer=1.5, token=12.0)
"""bfloat16 and float16, where rounding what is stored decides, the same in every right build."""

WIDE = Limits(all=4.0, slice=6.0, layer=4.0, token=30.0)
"""float32, where the order of sums decides, which is each kernel's own; faults lie a hundred times higher."""


def limits(dtype: str) -> Limits:
    """The limits of a dtype."""
    return WIDE if dtype == "float32" else NARROW


SLICE_TOKENS = 16
"""A slice with fewer tokens is judged token by token only."""

TIE = 4.0
"""A gap between two logits is a near-tie within this many times the noise of the largest logits there."""
