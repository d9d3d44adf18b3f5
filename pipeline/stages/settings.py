"""Settings of a build. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.local import default_root
from pipeline.cache.remote import Remote
from pipeline.progress import Log, Progress, no_log, no_progress
from pipeline.recipe.schema import Recipe


@dataclass(frozen=True)
class BuildSettings:
    """One build: a recipe, the folder that its relative paths start at, and the folders to write.

    `workers`: compile processes, by default from cores and memory. `locked`: reject sources and toolchains that differ
    from the lock. `lock`: the lock's file, by default beside the recipe. `remote`: a shared cache of compiled graphs.
    """

    recipe: Recipe
    base: Path
    out: Path
    cache: Path = field(default_factory=default_root)
    workers: int | None = None
    validate: bool = True
    locked: bool = False
    remote: Remote | None = None
    lock: Path | None = None
    log: Log = no_log
    progress: Progress = no_progress

    @property
    def lock_file(self) -> Path:
        """The recipe's lock, which need not exist."""
        return self.lock or self.base / f"{self.recipe.name}.lock"
