"""Compiling a graph with and without our stand-in for `<regex>` (`pipeline/backends/inductor/include`), in turns.

    python benchmarks/wrapper_compile.py [--rounds 3]

One decode graph of a tiny random pair. Seconds are processor seconds of the C++ compiler alone, with warm precompiled
headers; sizes are of the shared library in the package.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline.backends.inductor import scratch  # noqa: E402 - after the path
from pipeline.backends.inductor.backend import InductorBackend  # noqa: E402
from pipeline.graphs.spec import GraphSpec  # noqa: E402
from pipeline.recipe.schema import InductorSettings  # noqa: E402
from support.pairs import make_pair  # noqa: E402


def compiler_seconds() -> float:
    """Return the processor time of ended child processes, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compiled(headers: Path) -> tuple[float, int]:
    """Return processor seconds of the compiler and bytes of the library, with the headers in a folder."""
    backend = InductorBackend(InductorSettings())
    flags = backend.flags() | {"headers": str(headers)}  # so that precompiled headers of the two do not mix
    with (
        tempfile.TemporaryDirectory() as work,
        mock.patch.object(scratch, "INCLUDE", headers),
        mock.patch.object(backend, "flags", lambda: flags),
    ):
        traced = backend.trace(GraphSpec("decode", 2, 1, 40), make_pair().shape)
        before = compiler_seconds()
        backend.compile(traced, Path(work))
        with zipfile.ZipFile(Path(work, backend.graph_file)) as package:
            library = next(entry for entry in package.infolist() if entry.filename.endswith(".so"))
    return compiler_seconds() - before, library.file_size


def in_its_own_process(headers: Path) -> tuple[float, int]:
    """Return what `compiled` does: Inductor remembers the precompiled header of a process's first graph."""
    command = [sys.executable, "-W", "ignore", __file__, "--headers", str(headers)]
    seconds, size = subprocess.run(
        command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace"
    ).stdout.split()
    return float(seconds), int(size)


def main() -> None:
    """Compile in turns, after a warm-up of each, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--headers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.headers:
        print(*compiled(options.headers))
        return
    with tempfile.TemporaryDirectory() as empty:
        ways = {"standard <regex>": Path(empty), "ours": scratch.INCLUDE}
        for headers in ways.values():
            in_its_own_process(headers)
        runs = [{way: in_its_own_process(headers) for way, headers in ways.items()} for _ in range(options.rounds)]
    seconds = {way: statistics.median(run[way][0] for run in runs) for way in ways}
    print(f"median of {options.rounds} rounds")
    for way in ways:
        print(f"  {way:<18}{seconds[way]:6.2f} s{runs[0][way][1] / 1024:8.0f} KiB")
    print(f"  ratio             {seconds['standard <regex>'] / seconds['ours']:6.2f}")


if __name__ == "__main__":
    main()
