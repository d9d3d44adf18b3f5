"""Check, before it is signed, an artifact that another job built: `check_artifact.py RECIPE`, in a checkout.

Its recipe and the pins of its lock must be those of this checkout, its gates must have passed, and its provenance must
name this workflow's run. `tandem verify` checks its files. Nothing of the artifact is run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import PairManifest, read
from pipeline.artifact.provenance import PROVENANCE, builder, builder_of
from pipeline.errors import TandemError
from pipeline.plan import lock
from pipeline.recipe import load


def faults(root: Path, recipe: Path) -> Iterator[str]:
    """Yield what speaks against a signature."""
    manifest, locked = read(root).manifest, lock.lock_path(recipe)
    if manifest.name != recipe.stem:
        yield f"name: expected {recipe.stem}, found {manifest.name}"
    if not isinstance(manifest, PairManifest) or manifest.recipe_digest != load(recipe).digest():
        yield f"the artifact is of another recipe than {recipe} of this commit"
    for problem in lock.check_locked(lock.read(locked), lock.read(root / "recipe.lock"), str(locked)):
        yield f"{problem.where}: {problem.what}"
    if manifest.passed is not True:
        yield "validation gates did not pass"
    yield from _of_another_run(json.loads((root / PROVENANCE).read_bytes()))


def _of_another_run(provenance: dict[str, Any]) -> Iterator[str]:
    """Yield differences between the run that provenance names and this one, in GitHub Actions."""
    run = os.environ.get("GITHUB_RUN_ID")
    if run is None:
        return
    if builder_of(provenance) != builder():
        yield f"builder: expected {builder()}, found {builder_of(provenance)}"
    invocation = provenance["predicate"]["runDetails"]["metadata"]["invocationId"]
    if f"/actions/runs/{run}/" not in invocation:
        yield f"run: expected {run}, found {invocation}"


if __name__ == "__main__":
    name = sys.argv[1]
    try:
        found = list(faults(Path("artifacts") / name, Path("recipes") / f"{name}.yaml"))
    except TandemError as error:
        found = [str(error)]
    sys.stderr.writelines(f"{name}: {fault}\n" for fault in found)
    sys.exit(4 if found else 0)
