"""Where the bytes of a file that a store sends come from: a path, or another store, without a copy on this host."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Literal, Protocol


class Remote(Protocol):
    """A file that is sent from another store; its text names the file in errors."""

    @property
    def fix(self) -> str:
        """Remedy for bytes of another digest."""
        ...

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the file, to be read once from its start to its end."""
        ...


Source = Path | Remote
"""A store may open it several times."""
