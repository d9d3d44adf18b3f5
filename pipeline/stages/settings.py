"""Settings of a build. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.local import default_root
from pipeline.cache.remote import Remote
from pipeline.errors import InputError
from pipeline.extras import require
from pipeline.plan.lock import read
from pipeline.progress import Log, Progress, no_log, no_progress
from pipeline.recipe.schema import Recipe

LOCAL = "local"
"""The executor that compiles in workers of this machine."""


@dataclass(frozen=True)
class BuildSettings:
    """One build: a recipe, the folder that its relative paths start at, and the folders to write.

    `workers`: compile processes, by default from cores and memory. `locked`: reject sources and toolchains that differ
    from the lock. `lock`: the lock's file, by default beside the recipe. `remote`: a shared cache of compiled graphs.
    `executor`: where graphs are compiled: `local`, `ray` or `ray://HOST:PORT` (`stages/nodes.py`). `send_weights`: send
    weights to the recipe's registries before the release, while graphs compile and gates run.
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
    executor: str = LOCAL
    send_weights: bool = False
    log: Log = no_log
    progress: Progress = no_progress

    @property
    def lock_file(self) -> Path:
        """The recipe's lock, which need not exist."""
        return self.lock or self.base / f"{self.recipe.name}.lock"


def check_together(builds: Sequence[BuildSettings]) -> None:
    """Check that builds can run together, and that each locked one has its lock, before any of them waits.

    Raises:
        InputError: two recipes of one name or output, or a lock that is missing or damaged.

    """
    for what, values in (
        ("name", [settings.recipe.name for settings in builds]),
        ("output", [str(settings.out.absolute()) for settings in builds]),
    ):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            fix = "give each recipe a name of its own, and name each recipe once"
            raise InputError(f"two recipes have the same {what}: {twice[0]}", where="recipes", fix=fix)
    for settings in builds:
        if settings.locked:
            read(settings.lock_file)


def check_executor(settings: BuildSettings) -> None:
    """Check the executor of a build, before any work.

    Raises:
        InputError: no such executor, a number of workers, or no shared cache that nodes can write.
        HostError: Ray is not installed.

    """
    if settings.executor == LOCAL:
        return
    where = f"--executor {settings.executor}"
    if settings.executor != "ray" and not settings.executor.startswith("ray://"):
        fix = "accepted: local, ray (the cluster of RAY_ADDRESS or of this machine), ray://HOST:PORT"
        raise InputError(f"unknown executor: {settings.executor}", where="--executor", fix=fix)
    if settings.workers is not None:
        fix = "omit --workers: Ray runs as many tasks as the nodes have cores and memory for"
        raise InputError("--workers is the number of processes on this machine", where=where, fix=fix)
    if settings.remote is None or settings.remote.mode != "write":
        fix = (
            "add `--remote-cache s3://BUCKET/PREFIX --push-cache`, or a folder that all nodes mount at the same path "
            "(TANDEM_REMOTE_CACHE, TANDEM_PUSH_CACHE=1)"
        )
        raise InputError("the nodes need a shared cache that they can write", where=where, fix=fix)
    require(["ray"], where)
