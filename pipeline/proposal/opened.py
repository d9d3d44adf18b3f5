"""Open a source for its config and tokenizer alone: weights on the Hub or in a store stay where they are. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.files.home import expanded
from pipeline.models.weights import EMBEDDING
from pipeline.progress import Progress
from pipeline.sources import hub
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint, with_shared_embedding
from pipeline.sources.heads import fit, with_readings
from pipeline.sources.kinds import fetch
from pipeline.sources.pair import check_pair
from pipeline.sources.tokenizer import require_tokenizer
from pipeline.sources.weights import weights

HUB = "hf://"


@dataclass(frozen=True)
class Opened:
    """A model without its weights, and its source as a recipe in some folder writes it."""

    source: str
    checkpoint: Checkpoint

    def written(self, folder: Path) -> str:
        """Return the source for a recipe in a folder: of the Hub with its commit, a folder relative to it."""
        if self.source.startswith(HUB):
            return f"{self.source.partition('@')[0]}@{self.checkpoint.revision}"
        if "://" in self.source or Path(expanded(self.source)).is_absolute():
            return self.source
        relative = os.path.relpath(self.source, folder)
        return relative if relative.startswith(".") else f"./{relative}"


def open_target(source: str, cache: Path, progress: Progress) -> Opened:
    """Open a target; relative folders start at the working directory.

    Raises:
        SourceError: a source that cannot be used, an unsupported model, no tokenizer; HostError: no network.

    """
    opened = _opened(source, cache, progress)
    require_tokenizer(opened.checkpoint)
    return opened


def open_draft(source: str, target: Opened, cache: Path, progress: Progress) -> Opened:
    """Open a draft and check that it fits a target; of its weights, the headers are read.

    Raises:
        SourceError: a source that cannot be used, or a draft that does not fit; HostError: no network.

    """
    opened = _opened(source, cache, progress)
    draft = with_readings(opened.checkpoint, {}, cache)
    if EMBEDDING not in weights(draft):
        draft = with_shared_embedding(draft)
    draft = fit(target.checkpoint, draft)
    check_pair(target.checkpoint, draft)
    return Opened(source, draft)


def _opened(source: str, cache: Path, progress: Progress) -> Opened:
    if source.startswith(HUB):
        fetched = hub.Hub().fetch(source.removeprefix(HUB), cache / "hub", progress, weights=False)
    else:
        fetched = fetch(source, base=Path(), cache=cache, progress=progress)
    checkpoint = open_checkpoint(
        fetched.root, revision=fetched.revision, remote=fetched.remote, read_weights=False, progress=progress
    )
    return Opened(source, checkpoint)
