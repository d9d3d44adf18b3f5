"""Measure a head's agreement with its target before anything is compiled, and reject one that is read wrongly."""

from __future__ import annotations

from pipeline.cache.local import Cache
from pipeline.errors import SourceError
from pipeline.stages.checks import Resolved
from pipeline.stages.settings import BuildSettings
from pipeline.validate.draft.short import is_refused, short_prompts, short_report
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts


def check_draft(settings: BuildSettings, sources: Resolved) -> None:
    """Measure how a head agrees with its target, in the short form of `tandem draft doctor`.

    Raises:
        SourceError: another reading of the head's file is better, or the head cannot reach the recipe's limits.

    """
    recipe = settings.recipe
    if not settings.validate or sources.pair[1].config.eagle3 is None:
        return
    tokens = encoded_prompts(short_prompts(recipe_prompts(recipe, settings.base)), sources.tokenizer)
    kept = Cache(settings.cache, "goldens")
    report = short_report(recipe, sources.pair, tokens, kept, settings.log, settings.progress)
    if report is None:
        return
    settings.log(f"draft: {report.line}" if report.verdict == "agrees" else f"warning: {report.line}")
    if is_refused(report, needs_acceptance=recipe.floor > 1):
        raise SourceError(report.line, where=recipe.place("draft"), fix=report.fix)
