"""Train a draft for a target that has none, on text of the target.

    prompts -> text and hidden states (parts on disk) -> training -> folder that a recipe can use

After a kill, data and training resume. The recipe's own prompts, on which the gates measure acceptance, are not part of
the training: prompts that share words with them are dropped, and the card's figures are of those prompts only.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from pipeline.distill.card import write_draft
from pipeline.distill.figures import DraftFigures, TrainingFacts
from pipeline.distill.job import Job
from pipeline.distill.settings import DRAFT_VOCAB, DistillSettings
from pipeline.errors import InputError
from pipeline.files.atomic import disk_errors
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import TAPS
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.heads import fit
from pipeline.sources.pair import at_key, check_pair, resolve


def distill(settings: DistillSettings) -> DraftFigures:
    """Write data, train, and write the draft's folder; return the card's figures.

    Raises:
        InputError: too few layers for three taps, an output directory of another origin, unreadable prompts.
        SourceError: the target, as in a build.

    """
    out = settings.out
    if out.exists() and not (out / "training.json").is_file():
        what = "output directory was not created by `tandem distill`"
        raise InputError(what, where=str(out), fix="use another --out, or remove the directory")
    job = prepare(settings)
    with disk_errors(job.folder):
        return _run(job)


def _run(job: Job) -> DraftFigures:
    """Write missing data, train, and write the draft's folder."""
    settings = job.settings
    job.write_data()
    sequences = job.sequences()
    settings.log(f"training on {len(sequences)} sequences, {job.counts.answer_tokens} answer tokens")
    held_out = job.held_out()
    trainer = job.trainer(sequences)
    trainer.train(sequences, [s for group in held_out.values() for s in group])
    if job.start_share is not None:
        trainer.average(job.start_share)
    by_class = {kind: trainer.accuracy(group) for kind, group in held_out.items()}
    figures = DraftFigures(
        method=settings.method,
        layers=settings.layers,
        start=settings.start.name if settings.start is not None else None,
        start_share=job.start_share,
        target=job.target.revision,
        data=job.counts,
        settings=TrainingFacts(**asdict(trainer.settings), draft_vocab=job.vocab),
        right_given_previous={kind: accuracy.given_previous for kind, accuracy in by_class.items()},
        tokens_per_step={kind: accuracy.tokens_per_step(4) for kind, accuracy in by_class.items()},
    )
    write_draft(settings.out, job.config_json, trainer.export(), job.ids(sequences), figures, settings.recipe)
    return figures


def _is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


def prepare(settings: DistillSettings) -> Job:
    """Return the job for these settings, with its target; check everything that needs no data."""
    cache = settings.cache / "sources"
    with at_key(settings.recipe, "target.source"):
        target = resolve(settings.recipe.target.source, base=settings.base, cache=cache)
    layers = target.config.layers
    if layers < TAPS:
        what = f"the target has {layers} layers; a head reads {TAPS}"
        raise InputError(what, where=settings.recipe.name, fix=f"use a target of {TAPS} layers or more")
    taps = (2, layers // 2, layers - 3) if layers >= 8 else tuple(range(layers))[-TAPS:]
    if not _is_here(settings.device):
        raise InputError(f"no such device: {settings.device!r}", where="--device", fix="use cpu")
    if settings.start is None:
        return Job(replace(settings, layers=_layers(settings, target)), target, taps, _vocab(settings, target))
    start = fit(target, resolve(str(settings.start.absolute()), base=settings.base, cache=cache, role="draft"))
    check_pair(target, start)
    vocab = _vocab_of_start(settings, start, target)
    if start.config.draft_kind.method != settings.method:
        settings = replace(settings, layers=_layers(settings, target))
    return Job(settings, target, taps_of(target.config, start.config) or taps, vocab, start)


def _layers(settings: DistillSettings, target: Checkpoint) -> tuple[int, ...]:
    """Return the target's layers that a new draft model, P-EAGLE head or DFlash draft starts from.

    With `start`, an EAGLE-3 head, they are those that the layers after the head's own start from.
    """
    layers, chosen = target.config.layers, settings.layers
    if settings.method == "draft_model":
        chosen = chosen or tuple(dict.fromkeys((0, 1, layers - 1)))
    elif settings.method in ("p_eagle", "dflash"):
        chosen = chosen or ((layers - 2, layers - 1) if settings.start is None else (layers - 1,))
    elif chosen:
        raise InputError("found layers for an EAGLE-3 head", where="--layers", fix="add --method draft_model")
    if wrong := [layer for layer in chosen if not 0 <= layer < layers]:
        what = f"found {wrong[0]}; the target has layers 0 to {layers - 1}"
        raise InputError(what, where="--layers", fix="use layers of the target")
    return chosen


def _vocab(settings: DistillSettings, target: Checkpoint) -> int:
    """Return the number of tokens that a new draft may propose."""
    return _within(settings.draft_vocab or DRAFT_VOCAB, target)


def _within(vocab: int, target: Checkpoint) -> int:
    """Return a vocabulary's size; raise an error if the target has fewer tokens."""
    if vocab > target.config.vocab:
        what = f"found {vocab}, more than the target's vocabulary of {target.config.vocab}"
        raise InputError(what, where="--draft-vocab", fix="use a smaller number")
    return vocab


def _vocab_of_start(settings: DistillSettings, start: Checkpoint, target: Checkpoint) -> int:
    """Return the vocabulary's size of a draft to train further: its own, or that of the settings.

    Raises:
        InputError: the start has the whole vocabulary, is a DFlash or DSpark draft, or cannot become a draft of this
            method, or it has its own layers and others are given.

    """
    method = start.config.draft_kind.method
    vocab = start.config.draft_vocab
    if vocab is None:
        what = "the draft has no reduced vocabulary"
        raise InputError(what, where=str(settings.start), fix="start from a draft of `tandem distill`")
    if DRAFT_KINDS[method].blocks:
        what = f"training a {DRAFT_KINDS[method].label} further is unsupported"
        raise InputError(what, where="--start", fix="train a new draft: remove --start")
    becomes_parallel = (method, settings.method) == ("eagle3", "p_eagle")
    if method != settings.method and not becomes_parallel:
        what = f"found {settings.method}, but the draft of --start is {method}"
        raise InputError(what, where="--method", fix=f"use --method {method}")
    if becomes_parallel and start.config.eagle3 is not None and start.config.eagle3.reads_output:
        what = "the head of --start reads no layers of the target, as a P-EAGLE head must"
        raise InputError(what, where="--start", fix="train a new P-EAGLE head: remove --start")
    if settings.layers and not becomes_parallel:
        what = "found layers and --start, whose draft has its own layers"
        raise InputError(what, where="--layers", fix="remove --layers or --start")
    return _within(settings.draft_vocab or vocab, target)
