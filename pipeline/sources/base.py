"""The contract of a kind of source: one module each, with these three functions. Knows no kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.progress import Progress


@dataclass(frozen=True)
class Fetched:
    """A folder in Hugging Face layout, and a name for its content; an empty one where only the files can tell."""

    root: Path
    revision: str = ""


class SourceKind(Protocol):
    """What the module of a kind provides. A location is a source without its scheme."""

    def fetch(self, location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
        """Return the folder of `location`; `base` is the folder that relative paths start from.

        Raises:
            SourceError: the location or its content cannot be used. HostError: no network, no space.

        """
        ...

    def moving(self, location: str) -> bool:
        """Whether the content may change while the location stays the same, and no file on this host tells."""
        ...

    def current_revision(self, location: str, *, timeout_s: float) -> str | None:
        """Return the revision that a moving location names now; None where that cannot be determined.

        Raises:
            SourceError, HostError: as `fetch`.

        """
        ...
