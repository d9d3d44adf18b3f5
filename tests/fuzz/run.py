"""`make fuzz`: runs targets one after another, each in processes of its own, and prints what they found.

The journal of a target is `OUT/NAME.json`: a stopped run continues where it was. A fault is printed with the file that
replays it: `python -m fuzz.run --replay NAME FILE`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

from fuzz.targets import TARGETS, fault, scratch
from support.paths import ROOT

RESTARTS = 20
"""Processes of a target that may end in a crash or a hang before its run is given up."""


def fuzzed(name: str, out: Path, runs: int, seconds: float) -> bool:
    """Run one target; return whether it is free of faults."""
    from fuzz.worker import Journal  # imports atheris

    deadline = time.monotonic() + seconds
    journal = Journal.read(out / f"{name}.json")
    for _ in range(RESTARTS):
        left_s = deadline - time.monotonic()
        if journal.cases >= runs or left_s <= 0:
            break
        command = [
            sys.executable, "-m", "fuzz.worker", name, "--out", str(out), "--runs", str(runs),
            "--seconds", f"{left_s:.0f}", "--seed", str(1 + journal.cases),
        ]  # fmt: skip
        before, log = journal.cases, out / f"{name}.log"
        with log.open("ab") as file:
            status = subprocess.run(command, env=_environment(), stdout=file, stderr=file, check=False).returncode
        journal = Journal.read(out / f"{name}.json")
        if status != 0:
            hung = sorted((out / "hang" / name).glob("*"), key=lambda path: path.stat().st_mtime)
            journal.cases = max(journal.cases, before + 1)
            journal.faults[f"process ended with status {status}"] = str(hung[-1] if hung else log)
            journal.write(out / f"{name}.json")
    rate = journal.cases / journal.seconds if journal.seconds else 0.0
    print(
        f"{name:<18}{journal.cases:>9} cases{rate:>8.0f}/s   slowest {journal.slowest_s * 1e3:7.1f} ms   "
        f"memory {journal.peak_mib:5.0f} MiB   faults {len(journal.faults)}",
        flush=True,
    )
    for what, file in journal.faults.items():
        print(f"    {what}\n        python -m fuzz.run --replay {name} {file}", flush=True)
    return not journal.faults


def _environment() -> dict[str, str]:
    """Return the environment of a worker: few threads, and no reserve of address space for each of them."""
    own = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **own}


def replay(name: str, path: Path) -> int:
    """Run one input and print what it raises."""
    with scratch() as folder:
        parse = TARGETS[name].prepare(Path(folder))
        started = time.perf_counter()
        error = fault(parse, path.read_bytes())
        took_s = time.perf_counter() - started
    if error is not None:
        traceback.print_exception(error)
    print(f"{name}: {'fault' if error else 'no fault'}, {took_s * 1e3:.1f} ms")
    return int(error is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of outside input.")
    parser.add_argument("--target", default="", help="name of a target (default: all); --list lists them")
    parser.add_argument("--runs", type=int, default=32_000, help="cases of each target, over all runs with this --out")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of each target in this run")
    parser.add_argument("--out", type=Path, default=ROOT / "build/fuzz")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"))
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{target.name:<18}{target.about}" for target in TARGETS.values()))
        return 0
    if options.replay:
        return replay(options.replay[0], Path(options.replay[1]))
    if options.target and options.target not in TARGETS:
        parser.error(f"unknown target {options.target!r}; --list lists them")
    if find_spec("atheris") is None:
        parser.error("atheris is not installed; run: pip install 'tandem-spec[fuzz]'")
    options.out.mkdir(parents=True, exist_ok=True)
    names = [options.target] if options.target else list(TARGETS)
    clean = [fuzzed(name, options.out.resolve(), options.runs, options.seconds) for name in names]
    print(f"{sum(clean)} of {len(clean)} targets without a fault")
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
