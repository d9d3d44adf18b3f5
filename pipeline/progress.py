"""How long work reports: callbacks that the command line fills and that do nothing by default. Shows nothing itself."""

from __future__ import annotations

from collections.abc import Callable

Log = Callable[[str], None]
"""Called with one line of what is going on."""

Progress = Callable[[str, float, float], None]
"""Called with what is under way, how much of it is done, and how much there is in all."""

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, by one thread at a time."""


def no_log(line: str) -> None:
    """No-op `Log`."""


def no_progress(what: str, done: float, total: float) -> None:
    """No-op `Progress`."""


def no_byte_progress(done: int, total: int) -> None:
    """No-op `ByteProgress`."""
