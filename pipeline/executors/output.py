"""Redirect the output of a worker, including that of native code, to a file, and follow the file while it grows."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.files.unfinished import work_folder

FOLLOW_S = 1.0
PIECE_BYTES = 1 << 20


@contextlib.contextmanager
def output_to(log_file: Path) -> Iterator[None]:
    """Append this process's output to `log_file` while the block runs."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in enumerate(saved, start=1):
                os.dup2(copy, target)
                os.close(copy)


@contextlib.contextmanager
def output_sent(send: Callable[[bytes], None]) -> Iterator[None]:
    """Call `send`, in a thread, with pieces of this process's output while the block runs; all are sent at its end."""
    with work_folder("output") as folder:
        file, ended = folder / "log", threading.Event()
        file.touch()
        follower = threading.Thread(target=_follow, args=(file, send, ended), name="output", daemon=True)
        follower.start()
        try:
            with output_to(file):
                yield
        finally:
            ended.set()
            follower.join()


def _follow(path: Path, send: Callable[[bytes], None], ended: threading.Event) -> None:
    with path.open("rb") as file:
        is_last = False
        while not is_last:
            is_last = ended.wait(FOLLOW_S)
            while piece := file.read(PIECE_BYTES):
                send(piece)
