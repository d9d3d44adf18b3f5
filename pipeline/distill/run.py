"""Train a draft for a target that has none: the target writes, a head learns to guess what it writes next.

    prompts -> text and hidden states (parts on disk) -> training -> folder that a recipe can name

Data and training resume where a kill left them. The recipe's own prompts, on which the gates measure acceptance, are
never trained on: prompts that share words with them are dropped, and the card counts on them alone.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from pipeline.distill.card import write_draft
from pipeline.distill.job import Job
from pipeline.distill.request import DRAFT_VOCAB, Request
from pipeline.errors import InputError
from pipeline.files.atomic import disk_errors
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import TAPS
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import check_pair, resolve


def distill(request: Request) -> dict[str, Any]:
    """Write data, train, export; returns the card's figures.

    Raises:
        InputError: a target too shallow for three taps, an `out` that holds something else, unreadable prompts.
        SourceError: the target, as in a build.

    """
    out = request.out
    if out.exists() and not (out / "training.json").is_file():
        raise InputError("there is something else", where=str(out), fix="give another --out, or remove it")
    job = prepare(request)
    with disk_errors(job.folder):
        return _run(job)


def _run(job: Job) -> dict[str, Any]:
    """Write what data is missing, train, export."""
    request, out = job.request, job.request.out
    job.write_data()
    sequences = job.sequences()
    request.log(f"training on {len(sequences)} sequences, {job.counts['answer_tokens']} tokens of answers")
    held_out = job.held_out()
    trainer = job.trainer(sequences)
    trainer.train(sequences, [s for group in held_out.values() for s in group])
    if job.start is not None:
        trainer.average(request.start_share)
    by_class = {kind: trainer.accuracy(group) for kind, group in held_out.items()}
    settings = asdict(trainer.settings) | {"draft_vocab": job.vocab}
    figures = {
        "method": request.method,
        "layers": list(job.request.layers),
        "start": request.start.name if request.start is not None else None,
        "start_share": request.start_share if request.start is not None else None,
        "target": job.target.revision,
        "data": job.counts,
        "settings": settings,
        "right_given_previous": {kind: accuracy.given_previous for kind, accuracy in by_class.items()},
        "tokens_per_step": {kind: accuracy.tokens_per_step(4) for kind, accuracy in by_class.items()},
    }
    write_draft(out, job.config_json, trainer.export(), job.ids(sequences), figures, request.recipe)
    return figures


def _is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


def prepare(request: Request) -> Job:
    """The job of a request: its target, and checks that need nothing written."""
    cache = request.cache / "sources"
    target = resolve(request.recipe.target.source, base=request.base, cache=cache)
    layers = target.config.layers
    if layers < TAPS:
        what = f"the target has {layers} layers; a head reads {TAPS}"
        raise InputError(what, where=request.recipe.name, fix=f"use a target of {TAPS} layers or more")
    taps = (2, layers // 2, layers - 3) if layers >= 8 else tuple(range(layers))[-TAPS:]
    if not _is_here(request.device):
        raise InputError(f"no device {request.device!r} here", where="--device", fix="use cpu")
    if request.start is None:
        return Job(replace(request, layers=_layers(request, target)), target, taps, _vocab(request, target))
    start = resolve(str(request.start.absolute()), base=request.base, cache=cache, role="draft")
    check_pair(target, start)
    return Job(request, target, taps_of(target.config, start.config) or taps, _agreed(request, start, target), start)


def _layers(request: Request, target: Checkpoint) -> tuple[int, ...]:
    """The target's layers that a new draft model starts from."""
    layers, chosen = target.config.layers, request.layers
    if request.method == "draft_model":
        chosen = chosen or tuple(dict.fromkeys((0, 1, layers - 1)))
    elif chosen:
        raise InputError("found layers for a head, which has one", where="--layers", fix="add --method draft_model")
    if wrong := [layer for layer in chosen if not 0 <= layer < layers]:
        what = f"found {wrong[0]}; the target has layers 0 to {layers - 1}"
        raise InputError(what, where="--layers", fix="use those")
    return chosen


def _vocab(request: Request, target: Checkpoint) -> int:
    """Tokens that a new draft may propose."""
    return _within(request.draft_vocab or DRAFT_VOCAB, target)


def _within(vocab: int, target: Checkpoint) -> int:
    """A vocabulary's size, refused where the target has fewer tokens."""
    if vocab > target.config.vocab:
        what = f"found {vocab}, more than the target's vocabulary of {target.config.vocab}"
        raise InputError(what, where="--draft-vocab", fix="use less")
    return vocab


def _agreed(request: Request, start: Checkpoint, target: Checkpoint) -> int:
    """Vocabulary of the draft to train further: its own size, unless another is asked for.

    The start is of the kind that is asked for, and has layers of its own.
    """
    method = "draft_model" if start.config.eagle3 is None else "eagle3"
    vocab = start.config.draft_vocab
    if vocab is None:
        raise InputError(
            "it has the whole vocabulary", where=str(request.start), fix="start from one that distill made"
        )
    if method != request.method:
        raise InputError(f"found {request.method}, but the start is {method}", where="--method", fix=f"write {method}")
    if request.layers:
        raise InputError("found layers beside a draft that has its own", where="--layers", fix="leave one of them out")
    return _within(request.draft_vocab or vocab, target)
