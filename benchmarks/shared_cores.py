"""What a step costs beside other processes, by how long OpenMP's threads wait before they sleep.

    python benchmarks/shared_cores.py [ARTIFACT] [--busy 0 1 2] [--spins 300000 3000 300] [--rounds 3]

Runs `step.py` with each `GOMP_SPINCOUNT` in turns, beside some processes that only compute. 300000 is libgomp's own
count. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that use a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps(artifact: Path, spins: int) -> list[float]:
    """Milliseconds of a decode step, and of a step of each K."""
    environment = os.environ | {"GOMP_SPINCOUNT": str(spins), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), str(artifact), "--seconds", "0"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True)
    found = re.search(r"^\| a step \| (.*) \|$", ended.stdout, re.M)
    assert found, ended.stdout
    return [float(value) for value in found[1].split(" | ")]


def main() -> None:
    """Print a row for each number of processes and of turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spins", type=int, nargs="+", default=[300000, 3000, 300])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    print("| other processes | turns | steps, ms: decode, then each K |\n| --- | --- | --- |")
    for count in asked.busy:
        took: dict[int, list[list[float]]] = {spins: [] for spins in asked.spins}
        with busy(count):
            for _ in range(asked.rounds):
                for spins in asked.spins:
                    took[spins].append(steps(asked.artifact, spins))
        for spins, rounds in took.items():
            typical = [median(each) for each in zip(*rounds, strict=True)]
            print(f"| {count} | {spins} | {', '.join(f'{ms:.2f}' for ms in typical)} |", flush=True)


if __name__ == "__main__":
    main()
