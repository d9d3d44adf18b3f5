"""The contract of a kind of source: one module per kind, with these three functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.progress import Progress
from pipeline.sources.remote import RemoteFile


@dataclass(frozen=True)
class Fetched:
    """A folder in Hugging Face layout, and the name of its content; empty where only digests of the files name it."""

    root: Path
    revision: str = ""
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Weight files by name that are not in the folder, but read where they are stored."""


class SourceKind(Protocol):
    """What the module of a kind provides. A location is a source without its scheme."""

    def fetch(self, location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
        """Return the folder of `location`; `base` is the folder that relative paths start from.

        Raises:
            SourceError: the location or its content cannot be used. HostError: no network, no space.

        """
        ...

    def moving(self, location: str) -> bool:
        """Return whether the content may change while the location and the files on this host stay the same."""
        ...

    def current_revision(self, location: str, *, timeout_s: float) -> str | None:
        """Return the revision that a moving location names now; None if that cannot be determined.

        Raises:
            SourceError, HostError: as `fetch`.

        """
        ...
