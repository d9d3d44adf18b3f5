"""Settings of a distillation, and the name of its data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.local import default_root
from pipeline.distill.prompts import OPENINGS
from pipeline.errors import InputError, no_string
from pipeline.models.draft_kind import DraftMethod
from pipeline.progress import Log, RateProgress, no_log, no_rate_progress
from pipeline.recipe.schema import Recipe

DRAFT_VOCAB = 7680
SEEDS = 2**32
"""Prompts of one seed, and the number of such seeds: draws are seeded with 64 bits."""

ROWS = 64
ANSWER_TOKENS = 192
LENGTH = 384
"""Longest sequence in the data, prompt and answer, in tokens."""

START_SHARE = 0.5
"""Share of `start` in the weights of a draft that is trained further."""


@dataclass(frozen=True)
class DistillSettings:
    """One draft to train. `tokens` of answers are written before training; `out` is the folder to write.

    `layers` are those of the target that a draft model or a parallel draft starts from, in order. `start` is the
    folder of a draft to train further, with its own layers and vocabulary; its share of the result is `start_share`
    (None: `Job.start_share`). An EAGLE-3 head may also become a P-EAGLE head, whose later layers start from `layers`.
    `text` are data folders of earlier runs for the same target, also learned from; their tokens count among `tokens`.
    `progress` is called with the answer tokens written.

    Raises:
        InputError: a seed that is out of range, or a string in place of a list.

    """

    recipe: Recipe
    base: Path
    out: Path
    tokens: int = 1_000_000
    steps: int = 4000
    draft_vocab: int | None = None
    method: DraftMethod = "eagle3"
    layers: tuple[int, ...] = ()
    start: Path | None = None
    start_share: float | None = None
    seed: int = 0
    objective: str = "distribution"
    device: str = "cpu"
    prompts: Path | None = None
    transcripts: Path | None = None
    text: tuple[Path, ...] = ()
    cache: Path = field(default_factory=default_root)
    log: Log = no_log
    progress: RateProgress = no_rate_progress

    def __post_init__(self) -> None:
        no_string(self.text, "text", "folders")
        no_string(self.layers, "layers", "layers")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"found {self.seed}; accepted: 0 to {SEEDS - 1}", where="--seed", fix="use another seed")


def data_key(settings: DistillSettings, revision: str, taps: tuple[int, ...]) -> str:
    """Return the name of the data: it depends on the content of its parts, and not on their number.

    The prompts of the gates are not part of it: sequences that share words with them are dropped when the data is read
    (`Job.sequences`).
    """
    files = [path.read_bytes() if path else b"" for path in (settings.prompts, settings.transcripts)]
    openings = OPENINGS if settings.prompts is None else ()
    # A list, as it always was: other keys would write hours of text again.
    facts = [revision, settings.recipe.target.dtype, taps, settings.seed * SEEDS, LENGTH, ANSWER_TOKENS, openings]
    text = json.dumps(facts).encode() + b"".join(hashlib.sha256(data).digest() for data in files)
    return hashlib.sha256(text).hexdigest()[:16]
