"""Agreement of a draft with its target's greedy answers, by place in a step, under teacher forcing.

Every answer position begins a chain of drafts: the first reads the target's states, each further one the draft's own
output, as in drafting. Drafts count while all before them in the chain are right.

Shapes: N chains, K places of a step, B rows, T positions, V the draft's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.speculation.chains import Batch, Guess

Guesses = Callable[[ModelConfig, dict[str, Tensor], Batch, int], Iterator[Guess]]
CERTAIN = 3.0
"""Standard errors by which a difference counts: one in 700 by chance."""


@dataclass(frozen=True)
class Agreement:
    """Chains of drafts: `reached_NK` where a chain came to a place, `right_NK` where its draft there was right too.

    `drafted_N` and `expected_N` are the first draft and the target's token.
    """

    reached_NK: Tensor
    right_NK: Tensor
    drafted_N: Tensor
    expected_N: Tensor

    @property
    def by_place(self) -> tuple[float, ...]:
        """Share of right drafts at each place, of those whose places before were right."""
        tried, right = self.reached_NK.sum(0), self.right_NK.sum(0)
        return tuple((right / tried.clamp(min=1)).tolist())

    @property
    def lengths(self) -> Tensor:
        """Right drafts of each chain, float64."""
        return self.right_NK.sum(1).double()

    def tokens_per_step(self, steps: int) -> float:
        """Return the expected tokens of a greedy step with K = `steps`; unmeasured places repeat the last rate."""
        rates = (self.by_place + self.by_place[-1:] * steps)[:steps]
        return 1 + sum(math.prod(rates[: place + 1]) for place in range(steps))

    @property
    def chance(self) -> float:
        """Expected share of right first drafts, if drafts and tokens were drawn apart from each other."""
        size = int(max(self.drafted_N.max(), self.expected_N.max())) + 1 if len(self.drafted_N) else 1
        drafted, expected = (torch.bincount(ids, minlength=size).double() for ids in (self.drafted_N, self.expected_N))
        return float((drafted * expected).sum() / max(len(self.drafted_N), 1) ** 2)

    @property
    def is_chance(self) -> bool:
        """Whether the first drafts are right no more often than by chance."""
        count, rate = len(self.drafted_N), self.chance
        spread = math.sqrt(count * rate * (1 - rate))
        return int(self.right_NK[:, 0].sum()) <= count * rate + CERTAIN * spread + 1

    def is_better_than(self, other: Agreement, factor: float) -> bool:
        """Return whether these drafts are certainly right more often, chain by chain, and by at least this factor."""
        gain_N, theirs = self.lengths - other.lengths, float(other.lengths.mean())
        error = float(gain_N.std()) / math.sqrt(len(gain_N)) if len(gain_N) > 1 else math.inf
        return float(gain_N.mean()) > CERTAIN * error and theirs + float(gain_N.mean()) > factor * theirs


@torch.inference_mode()
def agreement(
    guesses: Guesses, config: ModelConfig, weights: dict[str, Tensor], ids_V: Tensor, batches: Sequence[Batch],
    places: int,
) -> Agreement:  # fmt: skip
    """Return the agreement of a draft with answers; `ids_V` are the target's ids of the draft's vocabulary."""
    parts = [_of_batch(guesses(config, weights, batch, places), batch, ids_V, places) for batch in batches]
    return Agreement(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _of_batch(
    found: Iterator[Guess], batch: Batch, ids_V: Tensor, places: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `Agreement` has, for the chains of one batch."""
    shape = (*batch.learn_BT.shape, places)
    reached, right = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    begun = torch.zeros(shape[:2], dtype=torch.bool)
    drafted, expected = (torch.zeros(shape[:2], dtype=torch.long) for _ in range(2))
    for place, guess in enumerate(found):
        chains = guess.rows_M, guess.began_M
        best_M = ids_V[guess.logits_MV.argmax(-1)]
        tokens_M = batch.tokens_BT1[guess.rows_M, guess.positions_M + 1]
        if place == 0:
            begun[chains], drafted[chains], expected[chains] = True, best_M, tokens_M
        reached[(*chains, place)] = right[(*chains, place - 1)] if place else begun[chains]
        right[(*chains, place)] = reached[(*chains, place)] & (best_M == tokens_M)
    return reached[begun], right[begun], drafted[begun], expected[begun]
