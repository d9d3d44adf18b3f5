"""What the gates are given, and the clock of their stages. Runs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.cache.local import Cache
from pipeline.progress import Log
from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.prompts import Prompt

MODELS = ("target", "draft")


@dataclass(frozen=True)
class GateInputs:
    """An open artifact, the recipe and prompts to check it with, and its target and draft checkpoints."""

    engine: Engine
    recipe: Recipe
    prompts: list[Prompt]
    checkpoints: tuple[Checkpoint, Checkpoint]
    cache: Cache
    log: Log

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
    """Logs stages and adds up the seconds of each."""

    log: Log
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log a stage and time it."""
        self.log(f"  {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
