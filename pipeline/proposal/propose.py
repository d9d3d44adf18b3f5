"""A recipe for a target: its draft from the user, the table of known drafts, or its own files. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.models import mtp
from pipeline.models.config import ModelConfig
from pipeline.models.families import config_of
from pipeline.progress import Log, Progress
from pipeline.proposal.choices import Chosen, Pair, choose
from pipeline.proposal.known import KnownDraft, drafts_of
from pipeline.proposal.opened import Opened, open_draft, open_target
from pipeline.proposal.text import commented
from pipeline.recipe.chips import ChipName
from pipeline.sources.derived import derive

FEW_LAYERS = 4
"""Targets with fewer layers derive a draft of one."""

DERIVED_K, HEAD_K, MODEL_K, MODULE_K = 2, 3, 4, 2
"""K without a better source."""

DISTILL = "agrees rarely; train a draft with `tandem distill`, or name one with --draft"


@dataclass(frozen=True)
class Wish:
    """What a user asks for; `folder` is the folder of the recipe, `chip` is None for a CPU."""

    source: str
    folder: Path
    draft: str | None = None
    chip: ChipName | None = None
    traffic: Path | None = None


@dataclass(frozen=True)
class Proposal:
    """A recipe's name, its values with their reasons, and its text."""

    name: str
    chosen: Chosen
    text: str


def propose_recipe(wish: Wish, cache: Path, log: Log, progress: Progress) -> Proposal:
    """Return a recipe for a target.

    Raises:
        SourceError: a target or a named draft that cannot be used; HostError: no network.
        RecipeError: no number of ranks fits the chip. InputError: a file of traffic that cannot be used.

    """
    target = open_target(wish.source, cache, progress)
    name = _name(wish.source)
    draft, config = _draft(wish, target, cache, log, progress)
    base = Chosen({"name": name, "target.source": target.written(wish.folder)}, _of_target(target)) | draft
    chosen = choose(Pair(target.checkpoint, config, base), wish.chip, wish.traffic)
    return Proposal(name, chosen, commented(chosen, wish.source))


def _of_target(target: Opened) -> dict[str, str]:
    pinned = target.source.startswith("hf://")
    return {"target.source": "the commit of today: a recipe without one follows the branch"} if pinned else {}


def _name(source: str) -> str:
    """Return the name of a recipe for a source: the last part of its path, without version and options."""
    last = re.split(r"[@?]|==", source)[0].rstrip("/").rpartition("/")[2]
    return f"{re.sub(r'[^a-z0-9._-]+', '-', last.lower()).strip('._-') or 'pair'}-spec"


def _draft(
    wish: Wish, target: Opened, cache: Path, log: Log, progress: Progress
) -> tuple[Chosen, ModelConfig]:  # fmt: skip
    """Return the section of the draft with method and K, and the draft's config."""
    if wish.draft is not None:
        opened = open_draft(wish.draft, target, cache, progress)
        return _named(opened, wish.folder, "--draft", None), opened.checkpoint.config
    for known in drafts_of(wish.source):
        try:
            opened = open_draft(known.draft, target, cache, progress)
        except SourceError as error:
            log(f"{known.draft}: not used: {error.what}")
            continue
        return _named(opened, wish.folder, _credit(known), known.draft_tokens), opened.checkpoint.config
    return _derived(target) if not mtp.is_stated(target.checkpoint.config_json) else _module(target)


def _credit(known: KnownDraft) -> str:
    """Return where a draft of the table was seen, its licence, and what its card claims."""
    licence = f"licence {known.license}" if known.license else "licence: see its card"
    claim = f"; its card claims {known.claim}" if known.claim else ""
    return f"seen in {known.seen}; {licence}{claim}; not measured here"


def _named(draft: Opened, folder: Path, reason: str, tokens: int | None) -> Chosen:
    kind = draft.checkpoint.config.draft_kind
    k = tokens or (HEAD_K if kind.reads_target_states else MODEL_K)
    why = "as where the pair was seen" if tokens else f"a start for {kind.method}"
    return Chosen(
        {"draft.source": draft.written(folder), "speculation.method": kind.method, "speculation.draft_tokens": [k]},
        {"draft.source": reason, "speculation.draft_tokens": f"{why}; `tandem tune` measures the best K"},
    )


def _module(target: Opened) -> tuple[Chosen, ModelConfig]:
    """Return the draft that is the MTP module inside a target."""
    chosen = Chosen(
        {
            "draft.derive": {"from": "target", "mtp": True},
            "speculation.method": "mtp",
            "speculation.draft_tokens": [MODULE_K],
        },
        {
            "draft.derive": "the MTP module that the target's config states; a build says if its files lack it",
            "speculation.draft_tokens": "a module predicts one token, and more from its own output; `tandem tune` "
            "measures the best K",
        },
    )
    config_json = mtp.of_target(target.checkpoint.config_json, target.source)
    return chosen, config_of(config_json, target.source)


def _derived(target: Opened) -> tuple[Chosen, ModelConfig]:
    """Return a draft of the target's own layers: the first, the middle and the last."""
    count = target.checkpoint.config.layers
    layers = [0] if count < FEW_LAYERS else sorted({0, count // 2, count - 1})
    chosen = Chosen(
        {
            "draft.derive": {"from": "target", "layers": layers},
            "speculation.method": "draft_model",
            "speculation.draft_tokens": [DERIVED_K],
        },
        {
            "draft.derive": f"no known draft of this target: layers of its own, untrained, whose text {DISTILL}",
            "speculation.draft_tokens": "a start for a draft of its own layers; `tandem tune` measures the best K",
        },
    )
    return chosen, derive(target.checkpoint, tuple(layers)).config
