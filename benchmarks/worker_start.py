"""Start compile workers with and without a server process that has imported torch and its compiler.

    python benchmarks/worker_start.py --workers 2 --rounds 5

Each round starts both kinds in a fresh process, one after the other; medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from pipeline.executors.local import LocalExecutor

PRELOAD = ("torch._inductor.compile_fx",)
NAMES = ("ready after, s", "workers' processor, s", "private memory, MB")
PRIVATE = ("Private_Clean:", "Private_Dirty:")


def ready(_: int) -> tuple[float, float]:
    """Import what compiling needs; return this worker's processor seconds and its own memory in MB."""
    import torch._inductor.compile_fx  # noqa: F401

    time.sleep(1)  # so that each worker takes one job
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    kib = sum(int(line.split()[1]) for line in lines if line.startswith(PRIVATE))
    return time.process_time(), kib / 1024


def measure(workers: int, preload: tuple[str, ...]) -> list[float]:
    """Return seconds until all workers are ready, and the sums of their processor seconds and memory."""
    started = time.monotonic()
    results = LocalExecutor(workers, preload).run(ready, range(workers), lambda _: None)
    wall_s = time.monotonic() - started - 1
    return [wall_s, *(sum(column) for column in zip(*results, strict=True))]


def main() -> None:
    """Print the medians of both kinds, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", choices=["alone", "shared"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.workers, PRELOAD if options.kind == "shared" else ())))
        return
    rounds: dict[str, list[list[float]]] = {"alone": [], "shared": []}
    for _ in range(options.rounds):
        for kind, results in rounds.items():
            command = [sys.executable, __file__, "--workers", str(options.workers), "--kind", kind]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    alone, shared = ([median(column) for column in zip(*results, strict=True)] for results in rounds.values())
    print(f"{options.workers} workers, {options.rounds} rounds   each imports   shared   ratio")
    for name, before, after in zip(
        ("ready after, s", "workers' processor, s", "private memory, MB"), alone, shared, strict=True
    ):
        print(f"{name:30} {before:10.1f} {after:8.1f} {before / after:7.1f}")


if __name__ == "__main__":
    main()
