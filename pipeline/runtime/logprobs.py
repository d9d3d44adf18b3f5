"""Log probabilities of the target, before rules and temperature: of a step's tokens, and of logits of known tokens.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.speculation.shaping import log_probs


@dataclass(frozen=True)
class TokenLogProbs:
    """Log probability and rank (1: the most probable) of a token, and the most probable tokens, the first one first.

    They are the target's own, before rules and temperature.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Verified:
    """Tokens that a step emits for a row, and their log probabilities."""

    tokens: list[int]
    logprobs: list[TokenLogProbs]


def verified_row(out: Mapping[str, Tensor], slot: int, count: int, asked: int | None) -> Verified:
    """Return what a step emitted for a row, with the log probabilities of `asked` most probable tokens if not None."""
    tokens = out["tokens"][slot, :count].tolist()
    if asked is None:
        return Verified(tokens, [])
    columns = [out[name][slot, :count].tolist() for name in ("logprobs", "ranks")]
    columns += [out[name][slot, :count, :asked].tolist() for name in ("top_ids", "top_logprobs")]
    return Verified(tokens, [
        TokenLogProbs(token, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in zip(tokens, *columns, strict=True)
    ])  # fmt: skip


def of_known_tokens(logits_TV: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogProbs]:
    """Return the log probabilities of known tokens, each after the logits before it."""
    found = log_probs(logits_TV[None], torch.tensor([list(tokens)]), count)
    columns = (found.chosen_BT, found.rank_BT, found.top_ids_BTN, found.top_BTN)
    return [
        TokenLogProbs(token, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in zip(tokens, *(each[0].tolist() for each in columns), strict=True)
    ]
