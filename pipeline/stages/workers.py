"""Worker processes of the compile stage on this machine: their number, and the memory that they take."""

from __future__ import annotations

import os
import resource

from pipeline.memory import host_memory


def worker_count(graph_memory_bytes: int, graphs: int) -> int:
    """Return the number of workers that cores and available memory allow."""
    fits = host_memory().available // max(graph_memory_bytes, 1)
    return max(1, min(len(os.sched_getaffinity(0)), fits, graphs))


def peak_bytes() -> int:
    """Return the peak memory of this process and of the largest process that it started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024
