"""Callbacks by which long work reports its stages and progress; no-ops by default. This module prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Log = Callable[[str], None]
"""Called with one line of text."""

Progress = Callable[[str, float, float], None]
"""Called with the name of a task, the amount done, and the total."""

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and total bytes, by one thread at a time."""


RateProgress = Callable[[int, int, float], None]
"""Called with the number done, the total, and the number per second (0: not measured yet)."""


def no_log(line: str) -> None:
    """No-op `Log`."""


def no_progress(task: str, done: float, total: float) -> None:
    """No-op `Progress`."""


def no_byte_progress(done: int, total: int) -> None:
    """No-op `ByteProgress`."""


def no_rate_progress(done: int, total: int, per_s: float) -> None:
    """No-op `RateProgress`."""


@contextmanager
def working(task: str, progress: Progress) -> Iterator[None]:
    """Report a task of unknown length as in progress while the block runs."""
    progress(task, 0, 1)
    try:
        yield
    finally:
        progress(task, 1, 1)


@contextmanager
def stage(name: str, log: Log, progress: Progress = no_progress) -> Iterator[None]:
    """Report a stage as in progress while the block runs; log it with its time when it ends."""
    started = time.monotonic()
    with working(name.strip(), progress):
        yield
    log(f"{name} ({duration(time.monotonic() - started)})")


def duration(seconds: float) -> str:
    """Return a time for people: `0.4 s`, `12 s`, `6 min 1 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
