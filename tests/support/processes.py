"""Signals that a child must take, the members of a session, and waits with a limit."""

from __future__ import annotations

import signal
import time
from pathlib import Path


def heed_interrupts() -> None:
    """In a child to be: take Ctrl-C, even if whoever runs the tests ignores it, as background jobs of a shell do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
