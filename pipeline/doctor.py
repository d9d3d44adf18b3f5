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
from pipeline.errors import HostError, Problem, RecipeError
from pipeline.extras import error_of_another_torch, install_command, state
from pipeline.memory import host_memory

if TYPE_CHECKING:
    from pipeline.backends.base import Backend
    from pipeline.models.config import ModelConfig
    from pipeline.plan.plan import Plan
    from pipeline.recipe.backend_settings import BackendSettings
    from pipeline.recipe.schema import Recipe

GIB = 1 << 30


@dataclass
class Diagnosis:
    """`facts` by section and name; `problems` keep this machine from building or running."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def diagnose(settings: BackendSettings, recipe: Recipe | None = None, path: Path | None = None) -> Diagnosis:
    """Examine this machine for a backend (`settings` as in a recipe), and for one recipe whose file is `path`.

    Raises:
        InputError: the recipe's lock or sources cannot be used.

    """
    diagnosis = Diagnosis({"machine": _machine()})
    if (backend := _backend(settings, diagnosis)) is not None:
        device = backend.host()
        versions = backend.toolchain().as_dict()
        diagnosis.facts["packages"] = {name: of for name, of in versions.items() if device.get(name) != of}
        diagnosis.facts["device"] = device
        diagnosis.problems += backend.preflight()
    diagnosis.facts["commands"] = _commands(settings, can_build=not diagnosis.problems)
    if recipe is not None and path is not None:
        _recipe(diagnosis, recipe, path)
    return diagnosis


def _backend(settings: BackendSettings, diagnosis: Diagnosis) -> Backend | None:
    """Return a backend; None, with a problem, if its packages are not installed."""
    from pipeline.backends.base import make_backend

    try:
        return make_backend(settings)
    except HostError as error:
        diagnosis.problems += error.problems
        return None


def _commands(settings: BackendSettings, *, can_build: bool) -> dict[str, str]:
    """Return what this machine can do, by command: yes, or no with the command that installs what is missing."""
    packages = state(settings.name)
    others = error_of_another_torch("serve") if state("vllm") == "yes" else None
    ready = "yes" if can_build else "no; see the problems"
    return {
        "pull, verify, ls": "yes",
        "registries s3://": state("s3"),
        "registries hf://": state("hub"),
        "registries oci://": state("oci"),
        "sign, --require-signature": state("sign"),
        f"build, run ({settings.name})": ready if packages == "yes" else packages,
        "serve": f"no; {others.what}; run: {others.fix}" if others else state("vllm"),
    }


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
    """Add facts and problems of a recipe's plan, if its lock or folders on this host have the configs of the models."""
    from pipeline.plan.plan import make_plan

    configs = _configs(recipe, path)
    if configs is None:
        what = f"{path} has no lock, and its sources need a download; for a plan, run: tandem plan {recipe.argument()}"
        diagnosis.facts["recipe"] = {"plan": what}
        return
    try:
        plan = make_plan(recipe, *configs)
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


def _configs(recipe: Recipe, path: Path) -> tuple[ModelConfig, ModelConfig] | None:
    """Return the configs of target and draft without a download; None if they are not on this host."""
    from pipeline.plan.lock import lock_path, pair_configs, read
    from pipeline.sources.local import check_local

    if lock_path(path).is_file():
        return pair_configs(recipe, read(lock_path(path)), str(lock_path(path)))
    pair = check_local(recipe, path.parent, default_root() / "sources").pair
    return None if pair is None else (pair[0].config, pair[1].config)


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
