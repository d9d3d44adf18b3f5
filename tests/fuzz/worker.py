"""One target under atheris, in a process with a limit for its memory: counts cases, keeps faults, writes a journal.

`fuzz.run` starts this program. A fault does not end it: each kind is kept once, with the input that replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import atheris

from fuzz.mutations import MOST_BYTES, mutated

CASE_S = 1.0
MOST = {"yaml": 4096}
"""Limit for inputs of a form: the reader of YAML takes 0.1 s for a kilobyte when it is instrumented."""

MEMORY_BYTES = 256 << 20
"""Limit for the memory of a case, above that of the imports."""

HANG_S = 30
"""After this time, libFuzzer ends a case that does not end."""

JOURNAL_S = 5.0
SUSPECT_S = 0.25
"""Cases that take longer are run again: another process may have had the processor."""


@dataclass
class Journal:
    """What the runs of a target found, over all of them."""

    cases: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest: str = ""
    peak_mib: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Journal:
        return Journal(**json.loads(path.read_text())) if path.is_file() else Journal()

    def write(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)


class Worker:
    """Runs cases until `runs` are done in all, or `seconds` have passed in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        from fuzz.targets import TARGETS, fault, scratch

        self.target, self.fault = TARGETS[options.target], fault
        self.out, self.runs, self.seconds = Path(options.out), options.runs, options.seconds
        self.path = self.out / f"{options.target}.json"
        self.journal = Journal.read(self.path)
        self.folder = scratch()
        self.parse = self.target.prepare(Path(self.folder.name))
        self.seeds = [path.read_bytes() for path in self.target.seeds()]
        for seed in self.seeds:  # lazy imports, pools of threads and caches are no memory of a case
            self.fault(self.parse, seed)
        self.resident = _peak_bytes()
        self.started = self.written = time.monotonic()
        self.earlier_s = self.journal.seconds

    def limit_memory(self) -> None:
        """Let allocations fail beyond the limit."""
        with Path("/proc/self/statm").open() as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)

    def case(self, data: bytes) -> None:
        """Run one input."""
        took_s, error = self._timed(data)
        if took_s > SUSPECT_S:
            took_s = min(took_s, *(self._timed(data)[0] for _ in range(2)))
        if took_s > self.journal.slowest_s:
            self.journal.slowest_s, self.journal.slowest = took_s, str(self._keep("slowest", data))
        if took_s > CASE_S:
            self._note(f"more than {CASE_S:g} s", data)
        if error is not None:
            self._note(f"{type(error).__name__} in {_place(error)}: {str(error)[:80]!r}", data, _place(error))
        self.journal.cases += 1
        now = time.monotonic()
        if self.journal.cases >= self.runs or now - self.started > self.seconds:
            self.end()
        if now - self.written > JOURNAL_S:
            self._write()

    def _timed(self, data: bytes) -> tuple[float, BaseException | None]:
        started = time.perf_counter()
        error = self.fault(self.parse, data)
        return time.perf_counter() - started, error

    def _note(self, what: str, data: bytes, key: str = "") -> None:
        """Keep a fault once, the smallest input of its place."""
        known = next((name for name in self.journal.faults if name.startswith(what[:40]) and key in name), None)
        if known is None:
            self.journal.faults[what] = str(self._keep("fault", data))
            self._write()
        elif len(data) < Path(self.journal.faults[known]).stat().st_size:
            self.journal.faults[known] = str(self._keep("fault", data))

    def _keep(self, kind: str, data: bytes) -> Path:
        folder = self.out / kind / self.target.name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / hashlib.sha256(data).hexdigest()[:12]
        path.write_bytes(data)
        return path

    def _write(self) -> None:
        self.written = time.monotonic()
        self.journal.seconds = self.earlier_s + self.written - self.started
        self.journal.peak_mib = max(self.journal.peak_mib, (_peak_bytes() - self.resident) / (1 << 20))
        self.journal.write(self.path)

    def end(self) -> None:
        """End this process without atheris's own end, which would run destructors of libraries."""
        self._write()
        self.folder.cleanup()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def mutate(self, data: bytes, most: int, seed: int) -> bytes:
        """Return the next input: half of them by libFuzzer's own mutations, half by the structure of the input."""
        chance = random.Random(seed)
        if chance.random() < 0.4 or not self.seeds:
            return bytes(atheris.Mutate(data, most))
        base = data if chance.random() < 0.7 else chance.choice(self.seeds)
        return mutated(base, self.target.form, chance)[:most]


def _place(error: BaseException) -> str:
    """Return the innermost line of this package in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pipeline/" in frame.filename] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "?"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--out", required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    with atheris.instrument_imports(include=["pipeline"]):
        worker = Worker(options)
    worker.limit_memory()
    corpus = Path(options.out) / "corpus" / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = [str(path.parent) for path in worker.target.seeds()[:1]]
    limits = [
        f"-max_len={MOST.get(worker.target.form, MOST_BYTES)}",
        f"-timeout={HANG_S}",
        "-rss_limit_mb=0",
        f"-seed={options.seed}",
        "-verbosity=0",
    ]
    (worker.out / "hang" / options.target).mkdir(parents=True, exist_ok=True)
    prefix = f"-artifact_prefix={worker.out}/hang/{options.target}/"
    arguments = [sys.argv[0], str(corpus), *seeds, *limits, prefix, "-close_fd_mask=0"]
    atheris.Setup(arguments, worker.case, custom_mutator=worker.mutate)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
