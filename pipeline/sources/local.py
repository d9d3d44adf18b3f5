"""A recipe's sources in folders on this host, checked without reading weights: shards, tensors, config, tokenizer.

Sources of other kinds need a download; they are listed as not checked. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.files.home import expanded
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.sources.pair import Role, check_pair, checked, derived
from pipeline.sources.tokenizer import require_tokenizer


@dataclass(frozen=True)
class LocalSources:
    """The pair, if both models are on this host, and the sources that were not checked."""

    pair: tuple[Checkpoint, Checkpoint] | None
    unchecked: tuple[str, ...]


def check_local(recipe: Recipe, base: Path) -> LocalSources:
    """Check the sources of a recipe that are folders; relative ones start at `base`.

    Raises:
        SourceError: a missing folder or shard, tensors that do not fit the config, no tokenizer, or different ones.

    """
    target = _open(recipe.target.source, base, "target")
    if target is not None:
        require_tokenizer(target)
    if recipe.draft.derive is not None:
        draft = None if target is None else derived(target, recipe.draft.derive.layers)
    else:
        draft = _open(recipe.draft.source or "", base, "draft")
    if target is not None and draft is not None:
        check_pair(target, draft)
        return LocalSources((target, draft), ())
    named = ((target, recipe.target.source), (draft, recipe.draft.source))
    return LocalSources(None, tuple(source for checkpoint, source in named if checkpoint is None and source))


def _open(source: str, base: Path, role: Role) -> Checkpoint | None:
    """Return a checkpoint in a folder without digests of its weights; None for other kinds of source."""
    if "://" in source:
        return None
    checkpoint = open_checkpoint(base / expanded(source), read_weights=False)
    return checked(checkpoint, source, role)
