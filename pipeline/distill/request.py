"""What a distillation is asked for, and the name of its data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.local import default_root
from pipeline.distill.prompts import OPENINGS
from pipeline.errors import InputError
from pipeline.progress import Log, no_log
from pipeline.recipe.schema import Recipe

DRAFT_VOCAB = 7680
SEEDS = 2**32
"""Prompts that one seed of a request has room for, and how many such seeds there are: draws are seeded with 64 bits."""

ROWS = 64
ANSWER_TOKENS = 192
LENGTH = 384
"""Longest sequence that is learned, prompt and answer, in tokens."""


START_SHARE = 0.5
"""How much of a draft that is trained further stays."""


@dataclass(frozen=True)
class Request:
    """One draft to train. `tokens` of answers are written before training; `out` is the folder to write.

    `layers` are those of the target that a draft model starts from, in order (`method` `draft_model`). `start` is the
    folder of a draft to train further, as it is: its layers and its vocabulary; `start_share` of it stays. `text` are
    folders that earlier runs wrote for the same target, learned from as well; their tokens count among `tokens`.

    Raises:
        InputError: a seed that is out of range.

    """

    recipe: Recipe
    base: Path
    out: Path
    tokens: int = 1_000_000
    steps: int = 4000
    draft_vocab: int | None = None
    method: str = "eagle3"
    layers: tuple[int, ...] = ()
    start: Path | None = None
    start_share: float = START_SHARE
    seed: int = 0
    objective: str = "distribution"
    device: str = "cpu"
    prompts: Path | None = None
    transcripts: Path | None = None
    text: tuple[Path, ...] = ()
    cache: Path = field(default_factory=default_root)
    log: Log = no_log

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"found {self.seed}", where="--seed", fix=f"use 0 to {SEEDS - 1}")


def data_key(request: Request, revision: str, taps: tuple[int, ...]) -> str:
    """Names the data: what decides its parts, and not how many of them there are.

    The prompts of the gates are not in it: what is read is kept apart from those of today (`Job.sequences`).
    """
    files = [path.read_bytes() if path else b"" for path in (request.prompts, request.transcripts)]
    openings = OPENINGS if request.prompts is None else ()
    facts = [revision, request.recipe.target.dtype, taps, request.seed * SEEDS, LENGTH, ANSWER_TOKENS, openings]
    text = json.dumps(facts).encode() + b"".join(hashlib.sha256(data).digest() for data in files)
    return hashlib.sha256(text).hexdigest()[:16]
