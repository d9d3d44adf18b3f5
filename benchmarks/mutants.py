"""Which small faults in the code of graphs pass the gates: `python benchmarks/mutants.py`, or `make mutants`.

    python benchmarks/mutants.py [--count N] [--seed N] [--only TEXT]

Each mutant (`tests/support/mutants.py`) runs through all gates in the eager engine, with the pairs that run its
line (`tests/support/mutant_pairs.py`), the quickest first, until a gate fails: once with the pairs in float32, once
with those in bfloat16. A mutant that ends with an error is caught, too: no artifact is built. The seed decides the
choice of mutants, which is spread evenly over the functions; `--only` runs those whose text has these words.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.mutant_pairs import DTYPES, MutantPair, pairs, write_sources
from support.mutants import EXPLAINED, MODULES, Mutant, executed_lines, mutants

TIMEOUT_S = 300


@dataclass
class Ground:
    """The pairs, the seconds of each and the lines that each runs, as module and number."""

    work: Path
    seconds: dict[MutantPair, float] = field(default_factory=dict)
    lines: dict[MutantPair, set[tuple[str, int]]] = field(default_factory=dict)

    def of(self, mutant: Mutant, dtype: str) -> list[MutantPair]:
        """Return the pairs that run a mutant's line, the quickest first."""
        places = {(mutant.module, line) for line in mutant.lines}
        found = [pair for pair, lines in self.lines.items() if pair.dtype == dtype and places & lines]
        return sorted(found, key=self.seconds.__getitem__)


def prepared(work: Path) -> Ground:
    """Run all pairs without a mutant."""
    write_sources(work)
    ground = Ground(work)
    for pair in pairs():
        if not (run := pair.gates(work)).passed:
            sys.exit(f"{pair.name}, {pair.dtype}: gates fail without a mutant: {run.findings}")
        started = time.monotonic()
        with executed_lines() as ground.lines[pair]:
            pair.gates(work)
        ground.seconds[pair] = time.monotonic() - started
        print(f"{pair.name}, {pair.dtype}: {ground.seconds[pair]:.1f} s", flush=True)
    return ground


def chosen(ground: Ground, count: int, seed: int, only: str) -> list[Mutant]:
    """Return mutants of lines that run, in turn from each function."""
    by_function: dict[str, list[Mutant]] = defaultdict(list)
    without = Counter[str]()
    for mutant in (mutant for module in MODULES for mutant in mutants(module) if only in str(mutant)):
        if any(ground.of(mutant, dtype) for dtype in DTYPES):
            by_function[f"{mutant.module}:{mutant.function}"].append(mutant)
        else:
            without[f"{mutant.module}:{mutant.function}"] += 1
    print(f"in lines that no pair runs: {without.total()} mutants, of {', '.join(sorted(without))}")
    for name, of_function in by_function.items():
        random.Random(f"{seed} {name}").shuffle(of_function)
    functions = sorted(by_function, key=lambda name: random.Random(f"{seed} {name}").random())
    print(f"{len(functions)} functions, {sum(map(len, by_function.values()))} mutants", flush=True)
    turns = list(chain.from_iterable(zip_longest(*(by_function[name] for name in functions))))
    return [mutant for mutant in turns if mutant is not None][:count]


def caught_by(mutant: Mutant, ground: Ground, dtype: str) -> str | None:
    """Return what catches a mutant: a gate and the pair, or an error; None if it survives."""
    for pair in ground.of(mutant, dtype):
        try:
            signal.alarm(TIMEOUT_S)
            with mutant.planted():
                run = pair.gates(ground.work)
        except Exception as error:
            return f"error ({type(error).__name__}), {pair.name}"
        finally:
            signal.alarm(0)
        if not run.passed:
            return f"{next(gate for gate, findings in run.findings.items() if findings)}, {pair.name}"
    return None


def main(arguments: Sequence[str]) -> None:
    """Print the outcome of each mutant, then the score in each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    outcomes: dict[str, Counter[str]] = {dtype: Counter() for dtype in DTYPES}
    survivors: dict[Mutant, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        ground = prepared(Path(folder))
        found = chosen(ground, options.count, options.seed, options.only)
        for number, mutant in enumerate(found, 1):
            for dtype in DTYPES:
                outcome = caught_by(mutant, ground, dtype)
                outcomes[dtype]["survived" if outcome is None else outcome.split(",")[0]] += 1
                if outcome is None:
                    survivors[mutant].append(dtype)
                print(f"{number} of {len(found)}, {dtype}: {outcome or 'SURVIVED'}: {mutant}", flush=True)
    for dtype, counts in outcomes.items():
        print(f"{dtype}: {', '.join(f'{name} {count}' for name, count in counts.most_common())}")
    print(f"caught in one dtype or both: {len(found) - sum(len(of) == len(DTYPES) for of in survivors.values())}")
    for mutant, dtypes in survivors.items():
        why = next((reason for text, reason in EXPLAINED.items() if text in str(mutant)), "NOT EXPLAINED")
        print(f"survived in {' and '.join(dtypes)}: {mutant} ({why})")


def _too_slow(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main(sys.argv[1:])
