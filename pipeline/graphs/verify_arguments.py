"""Build the arguments of a `verify` graph: given drafts, and what each row asks of the target's scores. Needs torch.

Shapes: B rows of the graph's bucket, T = K + 1 positions, K draft tokens, V vocabulary, W words of `WORD_BITS` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import NO_DRAW, Arguments, Draw, StepRow, step_arguments
from pipeline.graphs.signature import WORD_BITS
from pipeline.graphs.spec import GraphSpec

EVERY_TOKEN = -1
"""A word of an `allowed` argument with every bit set."""


@dataclass(frozen=True)
class RowRules:
    """What a row asks of the target's scores; None and the defaults are neutral.

    Shapes: bias float32 [V], counts int32 [V], prompted bool [V], allowed int32 [at most T, W]: a bit for each token.
    """

    bias_V: Tensor | None = None
    counts_V: Tensor | None = None
    prompted_V: Tensor | None = None
    allowed_TW: Tensor | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


NEUTRAL = RowRules()


@dataclass(frozen=True)
class VerifyRow:
    """A row of a `verify` graph: at most K drafts after its last token, and its rules."""

    last_token: int
    position: int
    drafts: Sequence[int] = ()
    draw: Draw = NO_DRAW
    rules: RowRules = NEUTRAL


def verify_arguments(spec: GraphSpec, rows: Mapping[int, VerifyRow], vocab: int) -> Arguments:
    """Return the arguments of a `verify` graph; slots without a row are inactive.

    Shapes: drafts int32 [B, K] (-1 for none), bias float32, counts int32 and prompted bool [B, V], allowed int32
    [B, T, W], min_p and penalties float32 [B], and those of a step.
    """
    steps = {slot: StepRow(row.last_token, row.position, row.draw) for slot, row in rows.items()}
    drafts = torch.full((spec.batch, spec.draft_tokens), -1, dtype=torch.int32)
    for slot, row in rows.items():
        drafts[slot, : len(row.drafts)] = torch.tensor(row.drafts, dtype=torch.int32)
    rules = [rows[slot].rules if slot in rows else NEUTRAL for slot in range(spec.batch)]
    tensors = {
        "bias": torch.zeros(spec.batch, vocab),
        "counts": torch.zeros(spec.batch, vocab, dtype=torch.int32),
        "prompted": torch.zeros(spec.batch, vocab, dtype=torch.bool),
        "allowed": torch.full((spec.batch, spec.tokens, words(vocab)), EVERY_TOKEN, dtype=torch.int32),
    }
    for slot, each in enumerate(rules):
        given = (each.bias_V, each.counts_V, each.prompted_V)
        for tensor, values_V in zip(tensors.values(), given, strict=False):
            if values_V is not None:
                tensor[slot] = values_V
        if each.allowed_TW is not None:
            tensors["allowed"][slot, : len(each.allowed_TW)] = each.allowed_TW
    settings = {
        "min_p": [each.min_p for each in rules],
        "presence_penalty": [each.presence_penalty for each in rules],
        "frequency_penalty": [each.frequency_penalty for each in rules],
        "repetition_penalty": [each.repetition_penalty for each in rules],
    }
    numbers = {name: torch.tensor(values, dtype=torch.float32) for name, values in settings.items()}
    return step_arguments(spec, steps) | {"drafts": drafts} | tensors | numbers


def words(vocab: int) -> int:
    """Return the number of words that hold a bit for each token."""
    return -(-vocab // WORD_BITS)


def word_mask(tokens: Sequence[int], vocab: int) -> Tensor:
    """Return words with the bits of `tokens` set, int32 [W]."""
    bits = torch.zeros(words(vocab) * WORD_BITS, dtype=torch.int64)
    bits[torch.tensor(list(tokens), dtype=torch.int64)] = 1
    packed = (bits.view(-1, WORD_BITS) << torch.arange(WORD_BITS)).sum(dim=1)
    return torch.where(packed >= 1 << (WORD_BITS - 1), packed - (1 << WORD_BITS), packed).int()
