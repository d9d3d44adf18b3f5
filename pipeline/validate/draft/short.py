"""The short form of `tandem draft doctor`, which a build runs before it compiles and whose verdict is a gate.

Reports are kept with the goldens, so the gates of a build read what it measured before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline import __version__
from pipeline.memory import host_memory
from pipeline.progress import Log, Progress, stage
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.draft.examine import SHORT, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.prompts import Prompt

if TYPE_CHECKING:  # it imports the reference models of transformers
    from pipeline.validate.reference.goldens import GoldenStore

FORMAT = 1
"""Part of every key: raise it when the measurement changes."""


def short_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of the short form, some of the recipe's."""
    return chosen(prompts, SHORT.prompts)


def short_report(
    recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], prompts: Sequence[list[int]], kept: GoldenStore,
    log: Log, progress: Progress,
) -> DraftReport | None:  # fmt: skip
    """Return how a head agrees with its target's answers to `short_prompts`, given as tokens; measured once.

    None for checkpoints that are not on this machine, and for a target that is too large for it.
    """
    if any(checkpoint.remote for checkpoint in pair):
        return None
    dtype = usable_dtype(pair[0], recipe.target.dtype, host_memory().available)
    if dtype is None:
        log("draft: agreement not measured: the target does not fit half of the memory")
        return None
    key = _key(recipe, pair, prompts, dtype)
    report = _earlier(kept, key)
    if report is None:
        with stage("draft: agreement with the target", log, progress):
            report = examine(recipe, pair, prompts, dtype, SHORT, progress)
        kept.put(key, report.model_dump_json().encode())
    return report


def is_refused(report: DraftReport, *, needs_acceptance: bool) -> bool:
    """Return whether a draft is: one by chance is accepted by a recipe that states no acceptance."""
    if report.verdict == "chance":
        return needs_acceptance or bool(report.stated)
    return report.verdict != "agrees"


def _key(recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], tokens: Sequence[list[int]], dtype: str) -> str:
    """Return a digest of what decides a report."""
    files = [sorted((name, digest.sha256) for name, digest in checkpoint.files.items()) for checkpoint in pair]
    configs = [asdict(checkpoint.config) for checkpoint in pair]
    spec = recipe.model_dump(mode="json", include={"name", "speculation", "validate_"})
    text = json.dumps([__version__, FORMAT, files, configs, spec, tokens, dtype, asdict(SHORT)], sort_keys=True)
    return f"draft-{hashlib.sha256(text.encode()).hexdigest()}"


def _earlier(kept: GoldenStore, key: str) -> DraftReport | None:
    """Return the report of an earlier build; a missing or damaged one only costs time."""
    path = kept.get(key)
    try:
        return None if path is None else DraftReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
