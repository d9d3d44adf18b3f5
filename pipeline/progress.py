"""Callbacks by which long work reports its progress; no-ops by default. This module prints nothing."""

from __future__ import annotations

from collections.abc import Callable

Log = Callable[[str], None]
"""Called with one line of text."""

Progress = Callable[[str, float, float], None]
"""Called with the name of a task, the amount done, and the total."""

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and total bytes, by one thread at a time."""


def no_log(line: str) -> None:
    """No-op `Log`."""


def no_progress(task: str, done: float, total: float) -> None:
    """No-op `Progress`."""


def no_byte_progress(done: int, total: int) -> None:
    """No-op `ByteProgress`."""
