"""The engine's process of a server ends when the server's first process was killed: vLLM's own waits for ever then."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Watch the process that started this one, from a thread; a process that was started otherwise goes on."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # at once: nobody waits for an answer, and ranks end when their pipes close

    threading.Thread(target=watch, name="tandem-parent", daemon=True).start()
