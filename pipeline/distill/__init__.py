"""Train a draft for a target that has none: the target writes, a head learns to guess what it writes next.

    prompts -> text and hidden states (parts on disk) -> training -> folder that a recipe can name

Data and training resume where a kill left them. The recipe's own prompts, on which the gates measure acceptance, are
never trained on: prompts that share words with them are dropped, and the card counts on them alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.cache import default_root
from pipeline.errors import InputError
from pipeline.recipe import Recipe

Say = Callable[[str], None]

DRAFT_VOCAB = 7680
ROWS = 64
ANSWER_TOKENS = 192
LENGTH = 384
"""Longest sequence that is learned, prompt and answer, in tokens."""


def _silent(line: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Request:
    """One draft to train. `tokens` of answers are written before training; `out` is the folder to write."""

    recipe: Recipe
    base: Path
    out: Path
    tokens: int = 1_000_000
    steps: int = 4000
    draft_vocab: int = DRAFT_VOCAB
    seed: int = 0
    objective: str = "distribution"
    device: str = "cpu"
    prompts: Path | None = None
    transcripts: Path | None = None
    cache: Path = field(default_factory=default_root)
    say: Say = _silent


def distill(request: Request) -> dict[str, Any]:
    """Write data, train, export; returns the card's figures.

    Raises:
        InputError: a target too shallow for three taps, an `out` that holds something else, unreadable prompts.
        SourceError: the target, as in a build.

    """
    from pipeline.distill.card import write_head
    from pipeline.distill.train import Trainer

    out = request.out
    if out.exists() and not (out / "training.json").is_file():
        raise InputError("there is something else", where=str(out), fix="give another --out, or remove it")
    job = _prepare(request)
    job.write_data()
    sequences = job.sequences()
    request.say(f"training on {len(sequences)} sequences, {job.counts['answer_tokens']} tokens of answers")
    held_out = job.held_out()
    trainer: Trainer = job.trainer(sequences)
    trainer.train(sequences, [s for group in held_out.values() for s in group])
    by_class = {kind: trainer.accuracy(group) for kind, group in held_out.items()}
    settings = asdict(trainer.settings) | {"draft_vocab": request.draft_vocab}
    figures = {
        "target": job.target.revision,
        "data": job.counts,
        "settings": settings,
        "right_given_previous": {kind: accuracy.given_previous for kind, accuracy in by_class.items()},
        "tokens_per_step": {kind: accuracy.tokens_per_step(4) for kind, accuracy in by_class.items()},
    }
    write_head(out, job.config_json, trainer.export(), job.ids(sequences), figures, request.recipe)
    return figures


def _prepare(request: Request) -> Any:
    from pipeline.distill.job import Job
    from pipeline.sources import resolve

    target = resolve(request.recipe.target.source, base=request.base, cache=request.cache / "sources")
    layers = target.config.layers
    taps = (2, layers // 2, layers - 3) if layers >= 8 else tuple(range(layers))[-3:]
    if len(taps) < 3:
        what = f"the target has {layers} layers; a head reads three"
        raise InputError(what, where=request.recipe.name, fix="use a target of three layers or more")
    return Job(replace(request, cache=request.cache), target, taps)


def data_key(request: Request, revision: str, taps: tuple[int, ...]) -> str:
    """Names the data: everything that decides its parts, and not how many of them there are."""
    files = [path.read_bytes() if path else b"" for path in (request.prompts, request.transcripts)]
    facts = [revision, request.recipe.target.dtype, taps, request.seed, LENGTH, ANSWER_TOKENS]
    text = json.dumps(facts).encode() + b"".join(hashlib.sha256(data).digest() for data in files)
    return hashlib.sha256(text).hexdigest()[:16]
