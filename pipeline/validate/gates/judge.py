"""The distribution that a sampled token must come from, independent of the graphs' own sampling code.

Shapes: V vocabulary of the target, D of the draft.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import GREEDY, Choice

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
    """Computes distributions from logits: a draft's reduced vocabulary, the candidates that graphs keep, the noise.

    `tie` is the relative gap of two logits within which noise can swap them.
    """

    draft_ids: Tensor | None
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
        best = scaled_V.topk(kept)
        probs = torch.softmax(best.values, 0)
        inside = min(int((probs.cumsum(0) < choice.top_p).sum()) + 1, len(probs))
        probs_V[best.indices[:inside]] = probs[:inside] / probs[:inside].sum()
        return probs_V

    def draft_probabilities(self, logits_D: Tensor, choice: Choice, vocab: int) -> Tensor:
        """Return the distribution of a draft by the target's token ids, float64 [V]. The draft proposes no other id."""
        if self.draft_ids is None:
            shares = self.probabilities(logits_D[:vocab], choice)
            return torch.nn.functional.pad(shares, (0, vocab - len(shares)))
        shares = self.probabilities(logits_D, choice)
        return torch.zeros(vocab, dtype=torch.float64).scatter(0, self.draft_ids, shares)

    def nearly_in(self, logits_V: Tensor, choice: Choice, token: int) -> bool:
        """Return whether noise, which moves logits by `tie` at most, can explain a token with probability 0."""
        scaled_V, moved = self._scaled(logits_V, choice)
        best = scaled_V.topk(1 if choice.temperature == 0 else self._kept(logits_V, choice)).values
        above = float(torch.softmax(best, 0)[best > scaled_V[token] + moved].sum())
        lowered = above * math.exp(-moved) / (above * math.exp(-moved) + 1 - above)
        return float(scaled_V[token]) >= float(best[-1]) - moved and lowered < choice.top_p

    def selects(self, logits_V: Tensor, choice: Choice, uniform: float, token: int) -> bool:
        """Return whether a random number selects a token, up to noise; see `selected`."""
        return token in self.selected(logits_V, choice, uniform)

    def selected(self, logits_V: Tensor, choice: Choice, uniform: float) -> list[int]:
        """Return the tokens that a random number can select, up to noise.

        Tokens are in descending order of their logits; a random number u selects the first token at which the
        cumulative probability exceeds u. Noise reorders tokens and moves probabilities, so a token is selected by
        an interval of numbers that is wider than its probability.
        """
        probs_V = self.probabilities(logits_V, choice)
        scaled_V, moved = self._scaled(logits_V, choice)
        ids_N = probs_V.nonzero()[:, 0]
        if len(ids_N) == 1:
            return [int(logits_V.argmax()), *self._ties(logits_V)]
        scores_N, order_N = scaled_V[ids_N].sort(descending=True)
        before_N = torch.cat((torch.zeros(1, dtype=torch.float64), probs_V[ids_N[order_N]].cumsum(0)))
        above_N = before_N[torch.searchsorted(-scores_N, -(scores_N + 2 * moved))]
        below_N = 1 - before_N[torch.searchsorted(-scores_N, -(scores_N - 2 * moved), right=True)]
        border = float(probs_V[ids_N].min()) if len(ids_N) < len(probs_V) else 0.0
        slack = border + ROUNDING
        inside_N = (_lowered(above_N, moved) - slack <= uniform) & (1 - _lowered(below_N, moved) + slack >= uniform)
        return [int(token) for token in ids_N[order_N[inside_N]]]

    def explains(self, target_V: Tensor, draft_D: Tensor, choice: Choice, numbers: Numbers, token: int) -> bool:
        """Return whether the random numbers of a speculative step lead to its first token, up to noise."""
        if numbers.room == 0:
            return self.selects(target_V, choice, numbers.last, token)
        p_V = self.probabilities(target_V, choice)
        if numbers.copied is None:
            q_V = self.draft_probabilities(draft_D, choice, len(p_V))
            drafts = self._drafts(draft_D[: len(target_V)], choice, numbers.draft)
        else:
            q_V, drafts = torch.zeros_like(p_V), [numbers.copied]
            q_V[numbers.copied] = 1.0
        moved = self._scaled(target_V, choice)[1] + self._scaled(draft_D, choice)[1]
        margin = math.exp(2 * moved) * (1 + 100 * ROUNDING)
        if token in drafts and numbers.accept * float(q_V[token]) <= float(p_V[token]) * margin:
            return True
        rejected = [draft for draft in drafts if numbers.accept * float(q_V[draft]) * margin >= float(p_V[draft])]
        if not rejected or float(p_V[token]) * margin * margin < float(q_V[token]):
            return False
        return margin > EXACT or _in_residual(target_V, (p_V - q_V).clamp(min=0), numbers.last, token)

    def _drafts(self, logits_D: Tensor, choice: Choice, uniform: float) -> list[int]:
        """Return the tokens that a draft can propose with a random number."""
        tokens = self.selected(logits_D, choice, uniform)
        return tokens if self.draft_ids is None else [int(self.draft_ids[token]) for token in tokens]

    def _ties(self, logits_V: Tensor) -> list[int]:
        """Return the tokens that noise can make the best one."""
        close_V = logits_V >= logits_V.max() - self.tie * logits_V.abs().max()
        return [int(token) for token in close_V.nonzero()[:, 0]]

    def _scaled(self, logits_V: Tensor, choice: Choice) -> tuple[Tensor, float]:
        """Return logits over the temperature, and how far noise moves them."""
        scaled_V = logits_V.double() / (choice.temperature or 1.0)
        return scaled_V, self.tie * float(scaled_V.abs().max())

    def _kept(self, logits_V: Tensor, choice: Choice) -> int:
        return min(choice.top_k or len(logits_V), self.candidates or len(logits_V), len(logits_V))


@dataclass(frozen=True)
class Numbers:
    """Random numbers of the first token of a speculative step: of the draft, of its acceptance, and of the last token.

    `copied`: the token that prompt lookup proposed. `room`: how many drafts the cache has positions for.
    """

    draft: float
    accept: float
    last: float
    copied: int | None
    room: int


ROUNDING = 1e-5
"""Rounding of cumulative probabilities in float32, over a whole vocabulary."""

EXACT = 1.02
"""Where noise moves no ratio of probabilities by more than this, replacements of rejected drafts are compared, too."""


def _lowered(share: Tensor, moved: float) -> Tensor:
    """Return the least share of some tokens when the logits of all move by at most `moved`."""
    less = share * math.exp(-2 * moved)
    return torch.where(share < 1, less / (less + 1 - share).clamp(min=1e-300), 1.0)


def _in_residual(logits_V: Tensor, residual_V: Tensor, uniform: float, token: int) -> bool:
    """Return whether a random number selects a token by the residual; an empty one is a matter of rounding."""
    total = float(residual_V.sum())
    if total < 100 * ROUNDING:
        return True
    below = float(residual_V[logits_V > logits_V[token]].sum()) / total
    above = float(residual_V[logits_V >= logits_V[token]].sum()) / total
    slack = 100 * ROUNDING / total + (EXACT - 1)
    return below - slack <= uniform <= above + slack
