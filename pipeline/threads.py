"""How long threads of a graph or of torch wait for each other before they sleep. Imports no torch.

libgomp's threads spin for milliseconds by default. Where other processes use the cores too, the thread that they wait
for gets none meanwhile. A shorter wait costs nothing on a quiet machine, and makes a step up to four times as fast on a
shared one (`benchmarks/shared_cores.py`).
"""

from __future__ import annotations

import os

SPINS = "GOMP_SPINCOUNT"
POLICIES = (SPINS, "OMP_WAIT_POLICY")
SPIN_COUNT = 1000
"""Turns of libgomp's waiting loop: longer than Inductor's code between two loops of threads takes."""


def bound_spinning() -> None:
    """Set libgomp's limit for this process and those that it starts, unless the user has set one.

    libgomp reads it when torch is imported; later it affects new processes only.
    """
    if not any(name in os.environ for name in POLICIES):
        os.environ[SPINS] = str(SPIN_COUNT)
