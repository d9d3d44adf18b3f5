"""Measure a head's agreement with its target before anything is compiled, and reject one that is read wrongly."""

from __future__ import annotations

from pipeline.errors import SourceError
from pipeline.progress import stage
from pipeline.stages.checks import Resolved
from pipeline.stages.memory import host_memory
from pipeline.stages.settings import BuildSettings
from pipeline.validate.draft.examine import SHORT, chosen, examine, usable_dtype
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts


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
    with stage("draft: agreement with the target", settings.log, settings.progress):
        tokens = encoded_prompts(prompts, sources.tokenizer)
        report = examine(recipe, pair, tokens, dtype, SHORT, settings.progress)
    settings.log(f"draft: {report.line}")
    if is_refused(report, needs_acceptance=recipe.validate_.gates.tokens_per_step > 1):
        raise SourceError(report.line, where=recipe.place("draft"), fix=report.fix)


def is_refused(report: DraftReport, *, needs_acceptance: bool) -> bool:
    """Return whether a build stops: a draft by chance may be built by a recipe that states no acceptance."""
    if report.verdict == "chance":
        return needs_acceptance or bool(report.stated)
    return report.verdict != "agrees"
