"""The distribution that a sampled token must come from, independent of the graphs' own sampling code.

Shapes: V vocabulary of the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.graphs.arguments import GREEDY, Choice, Draw

SETTINGS = (
    Choice(1.0),  # what a client that sets nothing gets
    Choice(0.7, top_p=0.9),
    Choice(1.0, top_k=50),
    Choice(1.3, top_k=12, top_p=0.95),
    GREEDY,
    Choice(2.0),
    Choice(0.3, top_k=5, top_p=0.6),
)
"""Settings of the tests; rows of one batch have different ones."""


def setting_of(row: int, run: int) -> int:
    """Return the index of the settings of a row: each row has another one, and each has all of them in turn."""
    return (row + run) % len(SETTINGS)


def words(choice: Choice) -> str:
    """Return settings as text."""
    return f"temperature {choice.temperature:g}, top_k {choice.top_k}, top_p {choice.top_p:g}"


@dataclass(frozen=True)
class Judge:
    """Computes what must be sampled from logits, with the candidates that graphs keep.

    `tie` is the relative gap of two logits within which noise can swap them.
    """

    candidates: int | None
    tie: float

    def probabilities(self, logits_V: Tensor, choice: Choice) -> Tensor:
        """Return the distribution of logits under sampling settings, float64 [V]."""
        probs_V = torch.zeros(len(logits_V), dtype=torch.float64)
        if choice.temperature == 0:
            probs_V[int(logits_V.argmax())] = 1.0
            return probs_V
        scaled_V, kept = logits_V.double() / choice.temperature, self._kept(logits_V, choice)
        if kept == len(logits_V) and choice.top_p >= 1:
            return torch.softmax(scaled_V, 0)
        scores, order, probs = self._best(scaled_V, kept)
        if kept > len(probs) and float(probs.sum()) < choice.top_p:
            scores, order = scaled_V.sort(descending=True)
            probs = torch.softmax(scores, 0)
        inside = min(int((probs.cumsum(0) < choice.top_p).sum()) + 1, len(probs))
        probs_V[order[:inside]] = probs[:inside] / probs[:inside].sum()
        return probs_V

    def left_out(self, logits_V: Tensor) -> float:
        """Return the probability, at temperature 1, of the tokens that are no candidates."""
        probs_V = torch.softmax(logits_V.double(), 0)
        return 1 - float(probs_V.topk(self._kept(logits_V, SETTINGS[0])).values.sum())

    def nearly_in(self, logits_V: Tensor, choice: Choice, token: int) -> bool:
        """Return whether noise, which moves logits by `tie` at most, can explain a token with probability 0."""
        scaled_V, moved = self._scaled(logits_V, choice)
        best = scaled_V.topk(1 if choice.temperature == 0 else self._kept(logits_V, choice)).values
        above = float(torch.softmax(best, 0)[best > scaled_V[token] + moved].sum())
        lowered = above * math.exp(-moved) / (above * math.exp(-moved) + 1 - above)
        return float(scaled_V[token]) >= float(best[-1]) - moved and lowered < choice.top_p

    def selects(self, logits_V: Tensor, draw: Draw, position: int, token: int) -> bool:
        """Return whether a row's random numbers at a position select a token, up to noise.

        The token with the highest score plus Gumbel number is selected; noise moves scores, and tokens across the
        limits of top-k and top-p.
        """
        scaled_V, moved = self._scaled(logits_V, draw.choice)
        sure_V = self._surely_in(logits_V, draw.choice)
        if draw.choice.temperature > 0:
            scaled_V = scaled_V + torch.from_numpy(gumbel(draw.seed, position, len(logits_V)))
        best = float(scaled_V[sure_V].max()) if bool(sure_V.any()) else -math.inf
        return float(scaled_V[token]) >= best - 2 * moved - ROUNDING

    def _surely_in(self, logits_V: Tensor, choice: Choice) -> Tensor:
        """Return which tokens are within top-k and top-p whatever noise does, bool [V]."""
        scaled_V, moved = self._scaled(logits_V, choice)
        kept = self._kept(logits_V, choice)
        if choice.temperature == 0 or (kept == len(logits_V) and choice.top_p >= 1):
            return torch.ones_like(scaled_V, dtype=torch.bool)
        scores, order, probs = self._best(scaled_V, kept, more=kept + 64)
        kept = len(probs)
        count = torch.searchsorted(-scores, -(scores - 2 * moved), right=True)  # tokens that may be as high
        mass = torch.cat((torch.zeros(1, dtype=torch.float64), probs.cumsum(0)))[count.clamp(max=kept)]
        above = (mass - torch.nn.functional.pad(probs, (0, len(scores) - kept))).clamp(0, 1)
        raised = above * math.exp(2 * moved) / (above * math.exp(2 * moved) + 1 - above)
        inside = (count <= kept) & ((raised < choice.top_p - ROUNDING) | (choice.top_p >= 1))
        return torch.zeros_like(scaled_V, dtype=torch.bool).scatter(0, order, inside)

    def _best(self, scaled_V: Tensor, kept: int, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the highest scores, their tokens, and the probabilities among the `kept` tokens.

        Of a whole vocabulary, the first `NUCLEUS` tokens; `more` scores than are kept, otherwise.
        """
        size = len(scaled_V)
        scores, order = scaled_V.topk(min(NUCLEUS if kept == size else kept + more, size))
        probs = torch.softmax(scaled_V, 0)[order] if kept == size else torch.softmax(scores[:kept], 0)
        return scores, order, probs

    def _scaled(self, logits_V: Tensor, choice: Choice) -> tuple[Tensor, float]:
        """Return logits over the temperature, and how far noise moves them."""
        scaled_V = logits_V.double() / (choice.temperature or 1.0)
        return scaled_V, self.tie * float(scaled_V[scaled_V.isfinite()].abs().max())

    def _kept(self, logits_V: Tensor, choice: Choice) -> int:
        return min(choice.top_k or len(logits_V), self.candidates or len(logits_V), len(logits_V))


NUCLEUS = 4096
"""Tokens that are looked at first for top-p: sorting a whole vocabulary takes ten times as long."""

ROUNDING = 1e-4
"""Rounding of float32 scores, logarithms and cumulative probabilities over a whole vocabulary."""


def gumbel(seed: int, position: int, vocab: int) -> NDArray[np.float64]:
    """Return the Gumbel number of every token at a position, float64 [V].

    Independent of `pipeline.speculation.noise`: 16 rounds of SIMON with alternating halves of the seed as keys.
    """
    with np.errstate(over="ignore"):
        x = np.arange(vocab, dtype=np.uint32)
        y = np.full(vocab, position, dtype=np.uint32)
        for number in range(1, 17):
            key = np.uint32((seed >> 32 * ((number - 1) % 2) & 0xFFFFFFFF) ^ (number * 0x9E3779B9 & 0xFFFFFFFF))
            turned = [x << np.uint32(bits) | x >> np.uint32(32 - bits) for bits in (1, 8, 2)]
            x, y = y ^ turned[0] & turned[1] ^ turned[2] ^ key, x
    high, low = ((word >> np.uint32(9)).astype(np.float32) for word in (x, y))
    step = np.float32(2.0**-23)
    uniform = np.minimum((high + (low + np.float32(0.5)) * step) * step, np.float32(1 - 2.0**-24))
    return np.asarray(-np.log(-np.log1p(-uniform.astype(np.float64))))
