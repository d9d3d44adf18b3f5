"""The kinds of drafts and their facts for the rest of the pipeline, in one table. Imports no torch.

`speculation.drafters` has their computation, the family files of this room read their configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DraftMethod = Literal["draft_model", "eagle3", "p_eagle", "mtp", "dflash", "dspark"]
"""`speculation.method` of a recipe."""


@dataclass(frozen=True)
class DraftKind:
    """Facts of one kind of draft.

    `reads_target_states`: the draft runs on the target's hidden states. It is replicated on every rank, is never scored
    without the target, and runs in each decode step, so it can resume without a prefill. `keeps_features`: it keeps the
    features of one position between steps.
    `in_transformers`: transformers' assisted generation supports it as an assistant. `parallel`: one pass proposes all
    tokens of a step; `blocks`: that pass is over a block of the last token and masks. `label` names the kind in
    messages.
    """

    method: DraftMethod
    label: str
    reads_target_states: bool
    in_transformers: bool
    parallel: bool = False
    keeps_features: bool = False
    blocks: bool = False

    @property
    def floor(self) -> float:
        """Least tokens per step that a build accepts, if its recipe has no limit: about what such a step costs."""
        return 1.3 if self.reads_target_states else 1.0


DRAFT_MODEL = DraftKind("draft_model", "draft model", reads_target_states=False, in_transformers=True)
EAGLE3 = DraftKind(
    "eagle3", "EAGLE-3 head", reads_target_states=True, in_transformers=False, keeps_features=True
)  # fmt: skip
P_EAGLE = DraftKind(
    "p_eagle", "P-EAGLE head", reads_target_states=True, in_transformers=False, parallel=True, keeps_features=True
)
MTP = DraftKind("mtp", "MTP module", reads_target_states=True, in_transformers=False, keeps_features=True)
DFLASH = DraftKind(
    "dflash", "DFlash draft", reads_target_states=True, in_transformers=False, parallel=True, blocks=True
)
DSPARK = DraftKind(
    "dspark", "DSpark draft", reads_target_states=True, in_transformers=False, parallel=True, blocks=True
)
DRAFT_KINDS: dict[DraftMethod, DraftKind] = {
    kind.method: kind for kind in (DRAFT_MODEL, EAGLE3, P_EAGLE, MTP, DFLASH, DSPARK)
}
