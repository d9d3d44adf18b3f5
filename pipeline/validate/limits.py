"""The bounds of the parity gate, and why they are what they are. No torch.

Ratios are errors over the noise of the recipe's dtype. They are set from clean builds and planted faults: right builds
lie near 1 whatever the seed, faults above (`benchmarks/fault_rates.py`, `docs/results.md`).
"""

from __future__ import annotations

ATOL = 1e-5
MAP = {5: 0.011, 50: 0.02, 1000: 0.03}
"""Relative tolerance of the largest error among the baseline's top k."""

MAP_ALL = 0.05
"""The same for the root mean square error over the whole vocabulary."""

ALL_LIMIT, SLICE_LIMIT, TOKEN_LIMIT = 1.5, 2.5, 12.0
"""Error over noise: root mean square over all tokens, over a slice, and the largest of a token over the larger of its
own noise and the median."""

LAYER_LIMIT = 1.5
"""Error over noise of one layer's keys or values, root mean square."""

SLICE_TOKENS = 16
"""A slice with fewer tokens is judged token by token only."""

TIE = 4.0
"""A gap between two logits is a near-tie within this many times the noise of the largest logits there."""
