"""The kinds of drafts, and what the rest of the pipeline must know of each. One table; imports no torch.

What a kind computes is written in `speculation.drafters`, how its config is read in the family files here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DraftMethod = Literal["draft_model", "eagle3"]
"""`speculation.method` of a recipe."""


@dataclass(frozen=True)
class DraftKind:
    """Facts of one kind of draft.

    `reads_target_states`: it runs on the target's hidden states, so it is whole on every rank, is never scored without
    the target, keeps features between steps, and follows each decode step of the target: pausing it costs nothing.
    `in_transformers`: transformers' assisted generation takes it as an assistant.
    """

    method: DraftMethod
    reads_target_states: bool
    in_transformers: bool


DRAFT_MODEL = DraftKind("draft_model", reads_target_states=False, in_transformers=True)
EAGLE3 = DraftKind("eagle3", reads_target_states=True, in_transformers=False)
DRAFT_KINDS: dict[DraftMethod, DraftKind] = {kind.method: kind for kind in (DRAFT_MODEL, EAGLE3)}
