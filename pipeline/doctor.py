"""Facts of this machine, and the problems that prevent a build or a run. Prints nothing.

With a recipe, its backend is examined, and its plan is compared with memory and disk.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.local import default_root
from pipeline.errors import Problem, RecipeError
from pipeline.extras import install_command
from pipeline.stages.memory import host_memory

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.recipe.schema import BackendSettings, Recipe

GIB = 1 << 30


@dataclass
class Diagnosis:
    """`facts` by section and name; `problems` keep this machine from building or running."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def diagnose(settings: BackendSettings, recipe: Recipe | None = None, path: Path | None = None) -> Diagnosis:
    """Examine this machine for a backend (`settings` as in a recipe), and for one recipe whose file is `path`."""
    from pipeline.backends.base import make_backend

    backend = make_backend(settings)
    diagnosis = Diagnosis({"machine": _machine(), "packages": backend.toolchain().as_dict()}, backend.preflight())
    diagnosis.facts["device"] = backend.host()
    if recipe is not None and path is not None:
        _recipe(diagnosis, recipe, path)
    return diagnosis


def _machine() -> dict[str, str]:
    available, total = host_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{available / GIB:.1f} of {total / GIB:.1f} GiB available",
        "cache": f"{default_root()}, {_disk(default_root()) / GIB:.1f} GiB free",
        "executors": "local, ray" if find_spec("ray") else f"local; for ray run: {install_command('ray')}",
    }


def _recipe(diagnosis: Diagnosis, recipe: Recipe, path: Path) -> None:
    """Add facts and problems of a recipe's plan, if its lock has the configs of the models."""
    from pipeline.plan.lock import lock_command, lock_path, pair_configs, read
    from pipeline.plan.plan import make_plan

    if not lock_path(path).is_file():
        diagnosis.facts["recipe"] = {"plan": f"{path} has no lock; for a plan, run: {lock_command(path)}"}
        return
    try:
        plan = make_plan(recipe, *pair_configs(recipe, read(lock_path(path)), str(lock_path(path))))
    except RecipeError as error:
        diagnosis.problems += error.problems
        return
    largest = max(plan.compile_memory(spec) for spec in plan.graphs)
    ranks = plan.pair.models.tp
    diagnosis.facts["recipe"] = {
        "graphs": f"{len(plan.graphs)}, compiled for {ranks} {'rank' if ranks == 1 else 'ranks'}",
        "memory on a rank": f"{_size(plan.memory.total)}{_limit(plan)}",
        "memory to compile": f"{largest / GIB:.1f} GiB for the largest graph (estimate)",
        "artifact": f"{_size(plan.artifact_bytes)} (estimate)",
    }
    diagnosis.problems += _shortages(plan, largest)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB // 10 else f"{size_bytes / (GIB >> 10):.1f} MiB"


def _limit(plan: Plan) -> str:
    return "" if plan.memory_limit is None else f" of {plan.memory_limit / GIB:.0f} GiB on a core"


def _shortages(plan: Plan, largest: int) -> Iterator[Problem]:
    available, total = host_memory()
    if largest > total:
        what = f"the largest graph needs about {largest / GIB:.1f} GiB to compile, this machine has {total / GIB:.1f}"
        yield Problem("machine.memory", what, "build on a larger machine; a build needs no device")
    elif largest > available:
        needed = f"the largest graph needs about {largest / GIB:.1f} GiB to compile"
        what = f"{needed}, {available / GIB:.1f} GiB are available"
        yield Problem("machine.memory", what, "end other programs")
    disk = _disk(default_root())
    if plan.stored_bytes > disk:
        size = f"the files need about {plan.stored_bytes / GIB:.1f} GiB, with equal files counted once"
        what = f"{size}; the cache's disk has {disk / GIB:.1f} free"
        yield Problem("machine.disk", what, "set TANDEM_CACHE to a folder on a larger disk, and build there")


def _disk(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free
