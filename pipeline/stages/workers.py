"""The number of worker processes of the compile stage on this machine."""

from __future__ import annotations

import os


def worker_count(graph_memory_bytes: int, graphs: int) -> int:
    """Return the number of workers that cores and free memory allow."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), free // max(graph_memory_bytes, 1), graphs))
