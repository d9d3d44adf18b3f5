"""A source string -> a checked `Checkpoint`, and a recipe's target and draft, checked to fit each other.

A source is a folder (relative to the recipe's), `hf://org/name@revision`, `package://name==version` (a GGUF file in a
Python package), or `pico://family` (a tiny random model). Imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal

from pipeline.errors import SourceError
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import EMBEDDING
from pipeline.progress import Progress, no_progress
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint, with_shared_embedding
from pipeline.sources.derived import derive
from pipeline.sources.tokenizer import check_tokenizers, vocabulary_size
from pipeline.sources.weights import check_weights, weights

KINDS = {
    "hf": "pipeline.sources.hub",
    "package": "pipeline.sources.package",
    "pico": "pipeline.sources.pico",
}
"""Scheme of a source -> the module whose `fetch(location, cache, progress) -> (folder, revision)` brings it."""

Role = Literal["target", "draft"]


def resolve(
    source: str, *, base: Path, cache: Path, progress: Progress = no_progress, role: Role = "target"
) -> Checkpoint:
    """Bring a source here, open it and check its tensors against its config.

    `base` is the folder that relative sources start from. A draft may lack an embedding: it then shares its target's.

    Raises:
        SourceError: anything wrong with the source; HostError: no network, no space.

    """
    scheme, separator, location = source.partition("://")
    if not separator:
        root, revision = base / Path(source).expanduser(), ""
    elif scheme in KINDS:
        root, revision = import_module(KINDS[scheme]).fetch(location, cache, progress)
    else:
        fix = f"write a folder, or one of {', '.join(f'{kind}://' for kind in KINDS)}"
        raise SourceError(f"unknown kind of source {scheme!r}", where=source, fix=fix)
    checkpoint = open_checkpoint(root, revision=revision, memo=cache / "digests", progress=progress)
    if role == "draft" and EMBEDDING not in weights(checkpoint):
        checkpoint = with_shared_embedding(checkpoint)
    elif role == "target" and (checkpoint.config.draft_vocab or checkpoint.config.shares_embedding):
        fix = "name it as the draft, and the model it was made for as the target"
        raise SourceError("this checkpoint is a draft: it needs a target's vocabulary", where=source, fix=fix)
    check_weights(checkpoint)
    return checkpoint


def resolve_pair(
    recipe: Recipe, *, base: Path, cache: Path, progress: Progress = no_progress
) -> tuple[Checkpoint, Checkpoint]:
    """Target and draft of a recipe, checked to fit each other.

    Raises:
        SourceError: as `resolve`, and a draft that does not fit its target.

    """
    target = resolve(recipe.target.source, base=base, cache=cache, progress=progress)
    if recipe.draft.derive is not None:
        draft = derive(target, recipe.draft.derive.layers)
        check_weights(draft)
    elif recipe.draft.source is not None:
        draft = resolve(recipe.draft.source, base=base, cache=cache, progress=progress, role="draft")
    else:
        raise SourceError("the draft has neither a source nor a derivation", where="draft", fix="give one of the two")
    check_pair(target, draft)
    return target, draft


def check_pair(target: Checkpoint, draft: Checkpoint) -> None:
    """Refuse a draft that cannot propose tokens to this target.

    Both must have one tokenizer; their `vocab_size` may be padded differently beyond it.

    Raises:
        SourceError: another tokenizer, vocabulary, or (where it shares the embedding) hidden size.

    """
    check_tokenizers(target, draft)
    sizes = []
    if draft.config.shares_embedding or draft.config.draft_vocab:
        sizes.append(("vocab_size", target.config.vocab, draft.config.vocab))
    if draft.config.shares_embedding:
        sizes.append(("hidden_size", target.config.hidden, draft.config.hidden))
    fix = "use a draft that was made for this target, or `derive: {from: target, layers: [...]}`"
    for name, wanted, found in sizes:
        if wanted != found:
            raise SourceError(f"{name}={found}, but the target has {wanted}", where=str(draft.root), fix=fix)
    _check_head(target, draft)
    smaller = min(target.config.vocab, draft.config.vocab)
    if target.config.vocab != draft.config.vocab and (needed := vocabulary_size(target)) > smaller:
        what = (
            f"vocab_size={draft.config.vocab}, the target's is {target.config.vocab}; their tokenizer has {needed} ids"
        )
        raise SourceError(what, where=str(draft.root), fix=fix)


def _check_head(target: Checkpoint, draft: Checkpoint) -> None:
    """Refuse an EAGLE-3 head that was made for another target."""
    head = draft.config.eagle3
    if head is None:
        return
    fix = "use a head that was made for this target, or `tandem distill` one"
    if head.target_hidden != target.config.hidden:
        what = f"it reads hidden states of size {head.target_hidden}, the target's have {target.config.hidden}"
        raise SourceError(what, where=str(draft.root), fix=fix)
    taps = taps_of(target.config, draft.config)
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= target.config.layers:
        what = f"it reads the target's layers {list(taps)}, which has {target.config.layers}"
        raise SourceError(what, where=str(draft.root), fix=f"{fix}; eagle_config names its layers")
