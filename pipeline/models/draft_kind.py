"""The kinds of drafts and their facts for the rest of the pipeline, in one table. Imports no torch.

`speculation.drafters` has their computation, the family files of this room read their configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DraftMethod = Literal["draft_model", "eagle3"]
"""`speculation.method` of a recipe."""


@dataclass(frozen=True)
class DraftKind:
    """Facts of one kind of draft.

    `reads_target_states`: the draft runs on the target's hidden states. It is replicated on every rank, is never scored
    without the target, keeps features between steps, and runs in each decode step, so it can resume without a prefill.
    `in_transformers`: transformers' assisted generation supports it as an assistant.
    """

    method: DraftMethod
    reads_target_states: bool
    in_transformers: bool


DRAFT_MODEL = DraftKind("draft_model", reads_target_states=False, in_transformers=True)
EAGLE3 = DraftKind("eagle3", reads_target_states=True, in_transformers=False)
DRAFT_KINDS: dict[DraftMethod, DraftKind] = {kind.method: kind for kind in (DRAFT_MODEL, EAGLE3)}
