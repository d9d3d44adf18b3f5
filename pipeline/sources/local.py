"""A recipe's sources that need no download, checked without reading weights: shards, tensors, config, tokenizer.

These are folders on this host, and tiny models that are generated. Sources of other kinds are listed as not checked.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError, together
from pipeline.progress import no_progress
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.sources.folder import located
from pipeline.sources.heads import fit, with_readings
from pipeline.sources.kinds import fetch
from pipeline.sources.pair import NO_READINGS, Role, at_key, check_fit, checked, derived
from pipeline.sources.pico import check_location
from pipeline.sources.tokenizer import require_tokenizer

GENERATED_WITH = ("numpy", "tokenizers")
"""Packages that generate tiny models, of the extras that build."""


@dataclass(frozen=True)
class LocalSources:
    """The pair, if both models are on this host, and the sources that were not checked."""

    pair: tuple[Checkpoint, Checkpoint] | None
    unchecked: tuple[str, ...]


def check_local(recipe: Recipe, base: Path, cache: Path) -> LocalSources:
    """Check the sources of a recipe that need no download; relative folders start at `base`.

    Raises:
        SourceError: a missing folder or shard, tensors that do not fit the config, no tokenizer, or different ones;
            the problems of both models.

    """
    target = draft = None
    faults: list[SourceError] = []
    try:
        target = _target(recipe, base, cache)
    except SourceError as error:
        faults.append(error)
    try:
        draft = _draft(recipe, target, base, cache)
    except SourceError as error:
        faults.append(error)
    if faults:
        raise together(faults)
    if target is not None and draft is not None:
        draft = fit(target, draft)
        check_fit(recipe, target, draft)
        return LocalSources((target, draft), ())
    named = ((target, recipe.target.source), (draft, recipe.draft.source))
    return LocalSources(None, tuple(source for checkpoint, source in named if checkpoint is None and source))


def _target(recipe: Recipe, base: Path, cache: Path) -> Checkpoint | None:
    with at_key(recipe, "target.source"):
        target = _open(recipe.target.source, base, cache, "target")
        if target is not None:
            require_tokenizer(target)
        return target


def _draft(recipe: Recipe, target: Checkpoint | None, base: Path, cache: Path) -> Checkpoint | None:
    if recipe.draft.derive is not None:
        return None if target is None else derived(recipe, target)
    with at_key(recipe, "draft.source"):
        return _open(recipe.draft.source or "", base, cache, "draft", recipe.draft.readings)


def _open(
    source: str, base: Path, cache: Path, role: Role, readings: Mapping[str, Any] = NO_READINGS
) -> Checkpoint | None:
    """Return a checkpoint without digests of its weights; None for a source that needs a download."""
    if source.startswith("pico://"):
        check_location(source)
        if not all(map(find_spec, GENERATED_WITH)):
            return None
        root = fetch(source, base=base, cache=cache, progress=no_progress).root
    elif "://" in source:
        return None
    else:
        root = located(source, base)
    checkpoint = open_checkpoint(root, read_weights=False)
    return checked(with_readings(checkpoint, readings, cache) if role == "draft" else checkpoint, source, role)
