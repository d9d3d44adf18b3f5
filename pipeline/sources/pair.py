"""A source string -> a checked `Checkpoint`, and a recipe's target and draft, checked to fit each other.

A source is of one of the kinds in `kinds.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import SourceError
from pipeline.models.config import ModelConfig
from pipeline.models.weights import EMBEDDING
from pipeline.progress import Progress, no_progress
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint, with_shared_embedding
from pipeline.sources.derived import LAYERS, MTP, derive, derive_mtp
from pipeline.sources.generation import generation_of, with_generation
from pipeline.sources.heads import fit, with_readings
from pipeline.sources.kinds import fetch
from pipeline.sources.tokenizer import check_tokenizers, vocabulary_size
from pipeline.sources.weights import check_weights, weights

Role = Literal["target", "draft"]
NO_READINGS: Mapping[str, Any] = {}


def resolve(
    source: str, *, base: Path, cache: Path, progress: Progress = no_progress, role: Role = "target",
    readings: Mapping[str, Any] = NO_READINGS,
) -> Checkpoint:  # fmt: skip
    """Fetch a source, open it and check its tensors against its config.

    `base` is the folder that relative sources start from. A draft without an embedding shares its target's; `readings`
    are those of the recipe for a head. A target has its defaults of generation and all of its end-of-sequence ids.

    Raises:
        SourceError: anything wrong with the source; HostError: no network, no space.

    """
    checkpoint = _opened(source, base, cache, progress, role, readings)
    return with_generation(checkpoint) if role == "target" else checkpoint


def _opened(
    source: str, base: Path, cache: Path, progress: Progress, role: Role, readings: Mapping[str, Any] = NO_READINGS
) -> Checkpoint:
    fetched = fetch(source, base=base, cache=cache, progress=progress)
    memo = cache / "digests"
    checkpoint = open_checkpoint(
        fetched.root, revision=fetched.revision, memo=memo, progress=progress, remote=fetched.remote
    )
    if role == "draft":
        checkpoint = with_readings(checkpoint, readings, cache)
    return checked(checkpoint, source, role)


def checked(checkpoint: Checkpoint, source: str, role: Role) -> Checkpoint:
    """Return a checkpoint in its role, after checking its tensors against its config.

    Raises:
        SourceError: missing, extra or malformed tensors, malformed defaults of generation, or a draft as the target.

    """
    if role == "draft" and EMBEDDING not in weights(checkpoint):
        checkpoint = with_shared_embedding(checkpoint)
    elif role == "target" and _is_draft(checkpoint.config):
        fix = "use it as the draft, and the model that it was trained for as the target"
        what = "this checkpoint is a draft: it uses the embedding or the vocabulary of a target"
        raise SourceError(what, where=source, fix=fix)
    check_weights(checkpoint)
    if role == "target":
        generation_of(checkpoint)
    return checkpoint


def _is_draft(config: ModelConfig) -> bool:
    return bool(config.draft_vocab or config.shares_embedding or config.eagle3)


@contextmanager
def at_key(recipe: Recipe, key: str) -> Iterator[None]:
    """Name the recipe's line and key in an error about a source, whose own place goes into the text of the error."""
    try:
        yield
    except SourceError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        raise SourceError(what, where=recipe.place(key), fix=error.fix) from error


def resolve_pair(
    recipe: Recipe, *, base: Path, cache: Path, progress: Progress = no_progress, read_tokenizer: bool = True
) -> tuple[Checkpoint, Checkpoint]:
    """Return the target and draft of a recipe, checked to fit each other.

    Without `read_tokenizer`, the target may lack its tokenizer's end-of-sequence id: enough for plans.

    Raises:
        SourceError: as `resolve`, and a draft that does not fit its target.

    """
    with at_key(recipe, "target.source"):
        target = _opened(recipe.target.source, base, cache, progress, "target")
        if read_tokenizer:
            target = with_generation(target)
    if recipe.draft.derive is not None:
        draft = derived(recipe, target)
    elif recipe.draft.source is not None:
        with at_key(recipe, "draft.source"):
            draft = _opened(recipe.draft.source, base, cache, progress, "draft", recipe.draft.readings)
            draft = fit(target, draft)
    else:
        raise SourceError("the draft has neither source nor derive", where="draft", fix="set exactly one of the two")
    check_fit(recipe, target, draft)
    return target, draft


def derived(recipe: Recipe, target: Checkpoint) -> Checkpoint:
    """Return the draft that consists of layers of a target, or is its MTP module, with its tensors checked.

    Raises:
        SourceError: a layer or a module that the target does not have.

    """
    assert recipe.draft.derive is not None
    layers = recipe.draft.derive.layers
    key = MTP if layers is None else LAYERS
    place = recipe.place(key)
    draft = derive_mtp(target, place) if layers is None else derive(target, layers, place)
    with at_key(recipe, key):
        check_weights(draft)
    return draft


def check_fit(recipe: Recipe, target: Checkpoint, draft: Checkpoint) -> None:
    """Raise an error, at the recipe's key of the draft, for a draft that cannot propose tokens to this target.

    Raises:
        SourceError: as `check_pair`.

    """
    with at_key(recipe, "draft.source" if recipe.draft.source else "draft.derive"):
        check_pair(target, draft)


def check_pair(target: Checkpoint, draft: Checkpoint) -> None:
    """Raise an error for a draft that cannot propose tokens to this target.

    Both must have the same tokenizer; their `vocab_size` may be padded differently beyond it.

    Raises:
        SourceError: tokenizer, vocabulary, or (for a shared embedding) hidden size differ.

    """
    check_tokenizers(target, draft)
    sizes = []
    if draft.config.shares_embedding or draft.config.draft_vocab:
        sizes.append(("vocab_size", target.config.vocab, draft.config.vocab))
    if draft.config.shares_embedding:
        sizes.append(("hidden_size", target.config.hidden, draft.config.hidden))
    fix = "use a draft that was trained for this target, or `derive: {from: target, layers: [...]}`"
    for name, of_target, of_draft in sizes:
        if of_target != of_draft:
            raise SourceError(f"{name}={of_draft}, but the target has {of_target}", where=str(draft.root), fix=fix)
    _check_head(target, draft)
    smaller = min(target.config.vocab, draft.config.vocab)
    if target.config.vocab != draft.config.vocab and (needed := vocabulary_size(target)) > smaller:
        what = f"vocab_size={draft.config.vocab}, but the target has {target.config.vocab}; tokenizer ids: {needed}"
        raise SourceError(what, where=str(draft.root), fix=fix)


def _check_head(target: Checkpoint, draft: Checkpoint) -> None:
    """Raise an error for an EAGLE-3 head that was trained for another target."""
    if not draft.config.draft_kind.reads_target_states:
        return
    head = draft.config.eagle3
    assert head is not None
    fix = "use a head that was trained for this target, or train one with `tandem distill`"
    if head.target_hidden != target.config.hidden:
        what = f"the head reads hidden states of size {head.target_hidden}, but the target has {target.config.hidden}"
        raise SourceError(what, where=str(draft.root), fix=fix)
    size, rows = target.config.hidden, draft.config.hidden
    if head.reads_output and rows != size:
        what = f"the head reads the target's output, whose size is {size}, as features of size {rows}"
        raise SourceError(what, where=str(draft.root), fix=fix)
    if draft.config.shares_head and (draft.config.vocab != target.config.vocab or rows != size):
        what = f"the head has no lm_head, and that of the target is {target.config.vocab} x {size}, not {rows} wide"
        raise SourceError(what, where=str(draft.root), fix=fix)
