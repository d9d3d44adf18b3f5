"""Several drafted tokens in a row of a draft model, from every position of a text, in one pass.

While a chain of draft tokens lasts, the draft model reads tokens that the target accepts. One pass over the target's
text therefore covers all its inputs, and later draft tokens need no separate training.

Shapes: B sequences, T positions, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.models.caches import empty_caches
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import hidden_states
from pipeline.models.parallel import Pass, Seams, State, Writes, attend_up_to
from pipeline.models.weights import HEAD, NORM
from pipeline.speculation.chains import Batch, Guess
from pipeline.speculation.model import recurrence_of


class _Uncached(Seams):
    """No cache: each pass attends over its own keys, and later layers may share them."""

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:  # noqa: ARG002 - the seam's signature
        state[name] = new_BHTD
        return new_BHTD


def guesses(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, depths: int) -> Iterator[Guess]:
    """Yield the draft's answers at every learned position; a chain of `depths` tokens has the same answers in a row."""
    tokens_BT = batch.tokens_BT1[:, :-1]
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    attend, nowhere = attend_up_to(positions_T[None]), cast("Any", None)
    seams = _Uncached()
    caches, rows_B = empty_caches(config, len(tokens_BT), 0, weights[NORM].dtype), torch.arange(len(tokens_BT))
    state = {name: tensor for name, tensor in caches.items() if not name.startswith(("k.", "v."))}  # none is kept
    positions_BT, keep_BT = positions_T.expand_as(tokens_BT), torch.ones_like(tokens_BT, dtype=torch.bool)
    recurrence = recurrence_of(config, state, rows_B, positions_BT, keep_BT)
    run = Pass(positions_BT, state, nowhere, attend, recurrence=recurrence)
    hidden = hidden_states(config, weights, seams, tokens_BT, run)
    rows_M, positions_M = batch.learn_BT.nonzero(as_tuple=True)
    logits_MV = seams.linear(hidden.last_BTH[rows_M, positions_M], weights[HEAD], config.out_vocab)
    for depth in range(depths):
        first_M = (positions_M - depth).clamp(min=0)
        learned_M = batch.learn_BT[rows_M, first_M] & (positions_M >= depth)
        yield Guess(logits_MV[learned_M], rows_M[learned_M], positions_M[learned_M], first_M[learned_M])
