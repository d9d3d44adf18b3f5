"""Checks before any work: backend, prompts, sources, and the lock of a locked build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.artifact.manifest import Artifact
from pipeline.artifact.verify import check_host
from pipeline.backends.base import Backend, make_backend
from pipeline.errors import ArtifactError, PreflightError, RecipeError
from pipeline.models.eagle3 import describe, doubts
from pipeline.models.generation import generation_defaults, not_applied_warning
from pipeline.models.quantisation import KEY, read_quantisation
from pipeline.plan.lock import Lock, check_locked, make_lock, read, unpinned
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import Log
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.heads import verifier_note
from pipeline.sources.pair import resolve_pair
from pipeline.sources.pointers import unread_index
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.settings import BuildSettings
from pipeline.validate.lengths import cut_warning, token_counts
from pipeline.validate.prompts import recipe_prompts


@dataclass(frozen=True)
class Resolved:
    """A recipe's checked sources and what follows from them; `pair` is target and draft."""

    pair: tuple[Checkpoint, Checkpoint]
    plan: Plan
    lock: Lock
    tokenizer: dict[str, bytes]


def usable_backend(recipe: Recipe) -> Backend:
    """Return the backend of a recipe, after checking the requirements of this machine.

    Raises:
        PreflightError: every missing requirement with its fix.

    """
    backend = make_backend(recipe.backend)
    problems = backend.preflight()
    if problems:
        raise PreflightError(problems)
    return backend


def check_prompts(settings: BuildSettings) -> None:
    """Reject an unreadable prompt file before compiling; the gates read it after that.

    Raises:
        InputError: no such file, or a line that is not a prompt.

    """
    if settings.validate:
        recipe_prompts(settings.recipe, settings.base)


def warn_of_cut_prompts(settings: BuildSettings, tokenizer: Mapping[str, bytes]) -> None:
    """Log a warning, before anything is compiled, if validation prompts do not fit the caches."""
    if not settings.validate:
        return
    prompts = recipe_prompts(settings.recipe, settings.base)
    counts = token_counts(prompts, tokenizer)
    if warning := cut_warning(counts, settings.recipe.shapes, settings.recipe.validate_.max_new_tokens):
        settings.log(warning)


def warn_of_generation(settings: BuildSettings, target: Checkpoint) -> None:
    """Log a warning if the artifact will not apply some of its target's defaults of generation."""
    defaults = generation_defaults(target.generation, str(target.root))
    if settings_left_out := defaults.not_applied(settings.recipe.speculation.sampling):
        settings.log(not_applied_warning(settings_left_out))


def resolved(settings: BuildSettings, backend: Backend) -> Resolved:
    """Fetch and check the sources, plan, and compare with the lock where the build is locked.

    Raises:
        SourceError: a source that cannot be used.
        RecipeError: the recipe does not fit its models or the chip, or, if locked, an item differs from the lock.

    """
    recipe = settings.recipe
    pair = resolve_pair(recipe, base=settings.base, cache=settings.cache / "sources", progress=settings.progress)
    log_head(recipe, pair[1], settings.log)
    plan = make_plan(recipe, *(checkpoint.config for checkpoint in pair))
    check_readings(pair)
    _warn_of_indexes(pair, settings.log)
    log_quantised(pair, settings.log)
    lock = make_lock(recipe, *pair, backend.toolchain().as_dict(), backend.flags())
    if settings.locked:
        _compare(read(settings.lock_file), lock, settings)
    return Resolved(pair, plan, lock, tokenizer_files(pair[0]))


def log_head(recipe: Recipe, draft: Checkpoint, log: Log) -> None:
    """Log how a head's file is read, what it leaves open, and a target's name in it that is not the recipe's."""
    if draft.config.eagle3 is None:
        return
    note = verifier_note(recipe.target.source, draft.config_json)
    for line in (describe(draft.config), *doubts(draft.config_json), *([note] if note else [])):
        log(f"draft: {line}")


def _warn_of_indexes(pair: tuple[Checkpoint, Checkpoint], log: Log) -> None:
    """Log which weights are read, where a folder has two sets of them."""
    for root in dict.fromkeys(checkpoint.root for checkpoint in pair):
        if warning := unread_index(root):
            log(warning)


def log_quantised(pair: tuple[Checkpoint, Checkpoint], log: Log) -> None:
    """Log how quantised weights are read; a draft that is derived has its target's."""
    for role, checkpoint in zip(("target", "draft"), pair, strict=True):
        found = read_quantisation(checkpoint.config_json, str(checkpoint.root / "config.json"))
        if found is None or checkpoint.layers is not None:
            continue
        log(f"{role}: the checkpoint's {found.method} weights are dequantised")
        if found.unrounded:
            log(f"{role}: warning: activations are not rounded; {KEY}.{found.unrounded} says that they were")


def check_readings(pair: tuple[Checkpoint, Checkpoint]) -> None:
    """Reject a config that transformers reads otherwise than Tandem: gates would fail after compiling.

    Raises:
        SourceError: every field that differs, with both values.

    """
    from pipeline.validate.reading import check_reading  # here, because it imports transformers' models

    for checkpoint in pair:
        check_reading(checkpoint)


def _compare(locked: Lock, fresh: Lock, settings: BuildSettings) -> None:
    """Reject differences from the lock, and log differences in facts that are not pinned."""
    if problems := check_locked(locked, fresh, str(settings.lock_file)):
        raise RecipeError(problems)
    if differences := unpinned(locked, fresh):
        settings.log(f"lock: made on another machine; not pinned and different here: {differences}")


def runs_here(backend: Backend, artifact: Artifact, log: Log) -> bool:
    """Return whether this host can run the artifact; one for another chip or instruction set is not validated here."""
    try:
        check_host(artifact.manifest, backend.host())
    except ArtifactError as error:
        log(f"not validated: {error.what}; before you publish, run `tandem validate {artifact.root}` on such a host")
        return False
    return True
