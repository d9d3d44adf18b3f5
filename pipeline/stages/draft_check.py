"""Measure a head's agreement with its target before anything is compiled, and reject one that is read wrongly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from pipeline import __version__
from pipeline.errors import SourceError
from pipeline.files.atomic import write_atomic
from pipeline.progress import stage
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint
from pipeline.stages.checks import Resolved
from pipeline.stages.memory import host_memory
from pipeline.stages.settings import BuildSettings
from pipeline.validate.draft.examine import SHORT, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts

FOLDER, FORMAT = "draft-reports", 1
"""Folder in the cache with reports of earlier builds; a part of their keys, to raise when the measurement changes."""


def check_draft(settings: BuildSettings, sources: Resolved) -> None:
    """Measure how a head agrees with its target, in the short form of `tandem draft doctor`.

    Raises:
        SourceError: another reading of the head's file is better, or the head cannot reach the recipe's limits.

    """
    recipe, pair = settings.recipe, sources.pair
    if not settings.validate or pair[1].config.eagle3 is None or any(checkpoint.remote for checkpoint in pair):
        return
    dtype = usable_dtype(pair[0], recipe.target.dtype, host_memory().available)
    if dtype is None:
        settings.log("draft: agreement not measured: the target does not fit half of the memory")
        return
    prompts = chosen(recipe_prompts(recipe, settings.base), SHORT.prompts)
    tokens = encoded_prompts(prompts, sources.tokenizer)
    path = settings.cache / FOLDER / f"{_key(recipe, pair, tokens, dtype)}.json"
    report = _earlier(path)
    if report is None:
        with stage("draft: agreement with the target", settings.log, settings.progress):
            report = examine(recipe, pair, tokens, dtype, SHORT, settings.progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, report.model_dump_json().encode())
    settings.log(f"draft: {report.line}" if report.verdict == "agrees" else f"warning: {report.line}")
    if is_refused(report, needs_acceptance=recipe.floor > 1):
        raise SourceError(report.line, where=recipe.place("draft"), fix=report.fix)


def _key(recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], tokens: list[list[int]], dtype: str) -> str:
    """Return a digest of what decides a report."""
    files = [sorted((name, digest.sha256) for name, digest in checkpoint.files.items()) for checkpoint in pair]
    configs = [asdict(checkpoint.config) for checkpoint in pair]
    spec = recipe.model_dump(mode="json", include={"name", "speculation", "validate_"})
    text = json.dumps([__version__, FORMAT, files, configs, spec, tokens, dtype, asdict(SHORT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _earlier(path: Path) -> DraftReport | None:
    """Return the report of an earlier build; a missing or damaged one only costs time."""
    try:
        return DraftReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def is_refused(report: DraftReport, *, needs_acceptance: bool) -> bool:
    """Return whether a build stops: a draft by chance may be built by a recipe that states no acceptance."""
    if report.verdict == "chance":
        return needs_acceptance or bool(report.stated)
    return report.verdict != "agrees"
