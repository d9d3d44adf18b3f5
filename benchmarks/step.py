"""What a step costs, and where its time goes: plain decode and every K, in turns, outside the engine.

    PYTHONPATH=. python benchmarks/step.py [ARTIFACT] [--batch 1] [--position 200] [--seconds 5]

Medians of greedy steps, and, where Linux's `perf` is there, samples of the thread that calls (the others wait for it or
it for them): products with weights, attention, waiting for other threads, kernels of Inductor's own, all else: calls
between kernels, the allocator, Python. Sampling slows the process down; shares are of the median without it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pipeline.measure.tune import full_step
from pipeline.runtime.open import load

TURNS, STEPS, FREQUENCY = 8, 12, 4999
KINDS = {
    "attention": r"cached_attention",
    "products": r"block_linear|block_swiglu|expert_linear|expert_gated",
    "waiting": r"libgomp|libomp|libiomp",
    "other kernels": r"\bp[0-9a-f]{16}_|Sleef",
}
"""Parts of a step, by what a sample's symbol or library matches; the first that does counts."""
LIBRARY = "model.so"
"""A graph's library in its package, which is removed as soon as it is open: `perf` knows offsets in it, no symbols."""


def sampled(run: Callable[[], None], seconds: float, graph: Path) -> dict[str, float]:
    """Shares of the calling thread's time by kind of work, of a function that calls one graph over and over."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        command = ["perf", "record", "-q", "-F", str(FREQUENCY), "-p", str(os.getpid()), "-o", str(data)]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(1)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            run()
        recorder.send_signal(signal.SIGINT)
        recorder.wait()
        report = ["perf", "report", "-i", str(data), "--stdio", "--tid", str(os.getpid()), "--sort", "dso,symbol"]
        lines = output_of(report)
        names = symbols_of(graph, Path(folder))
    shares: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"\s*([\d.]+)%\s+(\S+).*\[[.k]\]\s+(\S+)", line):
            share, library, symbol = float(found[1]), found[2], found[3]
            if library == LIBRARY and symbol.startswith("0x"):
                place = bisect([offset for offset, _ in names], int(symbol, 16)) - 1
                symbol = names[place][1]
            shares[kind_of(f"{library} {symbol}")] += share
    return {kind: shares[kind] / shares.total() for kind in (*KINDS, "all else")}


def symbols_of(graph: Path, folder: Path) -> list[tuple[int, str]]:
    """Offsets and names of the functions of a graph's library, in order."""
    with zipfile.ZipFile(graph) as package:
        library = next(name for name in package.namelist() if name.endswith(f"/{LIBRARY}"))
        path = package.extract(library, folder)
    found = (re.match(r"([0-9a-f]+) [tTwW] (\S+)", line) for line in output_of(["nm", path]))
    return sorted((int(each[1], 16), each[2]) for each in found if each)


def output_of(command: list[str]) -> list[str]:
    """Lines that a command prints."""
    return subprocess.run(
        command, capture_output=True, text=True, check=True, encoding="utf-8", errors="replace"
    ).stdout.splitlines()


def kind_of(line: str) -> str:
    """Which part of a step a sample belongs to."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, line)), "all else")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--position", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5, help="of samples; 0: none")
    asked = parser.parse_args()
    engine = load(asked.artifact, share_prefixes=False)
    runs: dict[int, Callable[[], None]] = {}
    files = {}
    for graph in engine.graphs:
        wanted = graph.phase in ("decode", "speculate") and (graph.batch, graph.sampling) == (asked.batch, "greedy")
        if wanted and graph.draft_tokens not in runs:
            given = full_step(engine, graph, asked.position)
            files[graph.draft_tokens] = asked.artifact / "graphs" / graph.name / "graph.pt2"
            runs[graph.draft_tokens] = lambda graph=graph, given=given: engine.ranks.run(graph, given)
    took: dict[int, list[float]] = {steps: [] for steps in runs}
    for turn in range(TURNS + 1):
        for steps, run in runs.items():
            for number in range(STEPS):
                started = time.perf_counter()
                run()
                if turn and number > 1:
                    took[steps].append(time.perf_counter() - started)
    ordered = sorted(runs)
    typical = {steps: median(took[steps]) * 1e3 for steps in ordered}
    print("| ms | " + " | ".join(f"K={steps}" if steps else "plain" for steps in ordered) + " |")
    print("|" + " --- |" * (len(ordered) + 1))
    print("| a step | " + " | ".join(f"{typical[steps]:.2f}" for steps in ordered) + " |")
    print("| in plain steps | " + " | ".join(f"{typical[steps] / typical[0]:.2f}" for steps in ordered) + " |")
    if asked.seconds == 0 or shutil.which("perf") is None:
        return
    shares = {steps: sampled(runs[steps], asked.seconds, files[steps]) for steps in ordered}
    for kind in (*KINDS, "all else"):
        print(f"| {kind} | " + " | ".join(f"{shares[steps][kind] * typical[steps]:.2f}" for steps in ordered) + " |")


if __name__ == "__main__":
    main()
