"""Training of a draft model: some of the target's layers, in one pass over what the target wrote.

What a draft model reads while it drafts are tokens that the target takes, or the chain has ended, so one pass over the
target's text shows it all that it will see; later draft tokens need no training of their own.

Shapes: B sequences, T positions, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.distill.eagle3 import Batch, Guess
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import hidden_states
from pipeline.models.parallel import Seams, State, Writes, attend_up_to
from pipeline.models.weights import HEAD


class _Uncached(Seams):
    """Nothing is kept: each pass attends over its own keys."""

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:  # noqa: ARG002 - the seam's
        return new_BHTD


def guesses(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, depths: int) -> Iterator[Guess]:
    """The draft's answers at every learned position; chains of `depths` tokens are the same answers, in a row."""
    tokens_BT = batch.tokens_BT1[:, :-1]
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    attend, nowhere = attend_up_to(positions_T[None]), cast("Any", None)
    seams = _Uncached()
    hidden = hidden_states(config, weights, seams, tokens_BT, positions_T.expand_as(tokens_BT), {}, nowhere, attend)
    rows, places = batch.learn_BT.nonzero(as_tuple=True)
    logits_MV = seams.linear(hidden.last_BTH[rows, places], weights[HEAD], config.out_vocab)
    for depth in range(depths):
        first = (places - depth).clamp(min=0)
        whole = batch.learn_BT[rows, first] & (places >= depth)
        yield Guess(logits_MV[whole], (rows[whole], places[whole]), first[whole])
