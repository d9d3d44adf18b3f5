"""The inputs of the gates, and the clock of their stages. Runs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.progress import Log, Progress, no_progress, stage
from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.prompts import Prompt
from pipeline.validate.reference.goldens import GoldenStore

MODELS = ("target", "draft")


@dataclass(frozen=True)
class GateInputs:
    """An open artifact, the recipe and prompts to check it with, and its target and draft checkpoints.

    `draft_report` is the short form of `tandem draft doctor`, which compares readings of a head's file; None: not
    measured.
    """

    engine: Engine
    recipe: Recipe
    prompts: list[Prompt]
    checkpoints: tuple[Checkpoint, Checkpoint]
    cache: GoldenStore
    log: Log
    progress: Progress = no_progress
    draft_report: DraftReport | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether stochastic graphs were built."""
        return "stochastic" in self.recipe.speculation.sampling

    def dtype_of(self, model: str) -> str:
        """Return the dtype of a model's weights."""
        dtype = self.recipe.draft.dtype if model == "draft" else None
        return dtype or self.recipe.target.dtype


@dataclass
class StageClock:
    """Reports stages, logs the time of each when it ends, and adds up the seconds of equal names."""

    log: Log
    progress: Progress = no_progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, of: str = "") -> Iterator[None]:
        """Time a stage; `of` names the part, for the log only."""
        started = time.monotonic()
        with stage(f"  {name}{of}", self.log, self.progress):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
