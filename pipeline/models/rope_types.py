"""Rotary embeddings as data: their frequencies and which values turn. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRope:
    """All frequencies divided by `factor` (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN (Peng et al. 2023): pairs up to `first` keep their frequency, from `last` on it is divided by `factor`."""

    factor: float
    first: float
    last: float


@dataclass(frozen=True)
class DividedRope:
    """Each pair's frequency divided by a number of its own (LongRoPE, Ding et al. 2024, up to the original length)."""

    factors: tuple[float, ...]


@dataclass(frozen=True)
class ProportionalRope:
    """The first `pairs` turn, at frequencies of the whole head divided by `factor`; others stand still (Gemma 4)."""

    pairs: int
    factor: float


RopeScaling = LinearRope | Llama3Rope | YarnRope | DividedRope | ProportionalRope


@dataclass(frozen=True)
class Rope:
    """A rotary embedding (Su et al. 2021) of the first `dim` values of each head.

    `scale` multiplies cosines and sines. `interleaved`: neighbours turn together, instead of values of the two halves.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    scale: float = 1.0
    interleaved: bool = False
