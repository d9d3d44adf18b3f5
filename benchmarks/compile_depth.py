"""Compiling graphs of a target with 10 and with 80 layers, in turns: time, peak memory and size of the file.

    python benchmarks/compile_depth.py [--rounds 3] [--depths 10 80] [--hidden 512] [--ranks 1]

A Llama of random weights and one of its layers as the draft; three graphs (prefill, decode, speculate), each with its
subgraphs, one after the other in a new process; the container, which all share, is compiled with the first. Seconds
are processor seconds with the C++ compiler, with precompiled headers; the peak is that of the larger of the two
processes at work. `--ranks` compiles the graphs of one of several ranks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SPECS = (("prefill", 1, 64, 256, 0), ("decode", 1, 1, 256, 0), ("speculate", 1, 4, 256, 3))
Figures = dict[str, float]


def compiled(layers: int, hidden: int, ranks: int) -> dict[str, Figures]:
    """Compile the graphs in this process; return the figures of each phase."""
    import torch._inductor.compile_fx  # noqa: F401 - once, before the clock starts

    from pipeline.backends.inductor.backend import InductorBackend
    from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
    from pipeline.recipe.backend_settings import InductorSettings
    from support.graphs import compile_graph
    from support.pairs import make_pair

    target = replace(
        make_pair().shape.target, layers=layers, hidden=hidden, intermediate=3 * hidden, heads=8, kv_heads=4,
        head_dim=hidden // 8, vocab=32000,
    )  # fmt: skip
    models = ModelsSpec(target, replace(target, layers=1), "bfloat16", "bfloat16", tp=ranks, draft_replicated=False)
    pair, backend = PairSpec(models, rows=1, length=256), InductorBackend(InductorSettings())
    figures = {}
    for phase, batch, tokens, kv, steps in SPECS:
        spec = GraphSpec(phase, batch, tokens, kv, steps)
        with tempfile.TemporaryDirectory() as work:
            before = _seconds()
            size = len(compile_graph(backend, backend.trace(spec, pair), Path(work)))
        figures[phase] = {"seconds": _seconds() - before, "mib": size / 2**20, "peak_mib": _peak_mib()}
    return figures


def _seconds() -> float:
    """Return the processor time of this process and its ended children."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def _peak_mib() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


def in_its_own_process(layers: int, hidden: int, ranks: int) -> dict[str, Figures]:
    """Return what `compiled` does."""
    options = ["--one", str(layers), "--hidden", str(hidden), "--ranks", str(ranks)]
    command = [sys.executable, "-W", "ignore", __file__, *options]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    figures: dict[str, Figures] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Compile in turns, after a warm-up, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs=2, default=(10, 80))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compiled(options.one, options.hidden, options.ranks)))
        return
    in_its_own_process(1, options.hidden, options.ranks)  # precompiles the headers
    rounds: dict[int, list[dict[str, Figures]]] = {depth: [] for depth in options.depths}
    for _ in range(options.rounds):
        for depth in options.depths:
            rounds[depth].append(in_its_own_process(depth, options.hidden, options.ranks))
    print(f"{'':10}{'':10}" + "".join(f"{depth:>5} layers" for depth in options.depths) + "   ratio")
    for phase, *_ in SPECS:
        for name, unit in (("seconds", "s"), ("peak_mib", "MiB peak"), ("mib", "MiB file")):
            few, many = (statistics.median(r[phase][name] for r in rounds[depth]) for depth in options.depths)
            print(f"{phase:10}{unit:10}{few:12.2f}{many:12.2f}{many / few:8.2f}")


if __name__ == "__main__":
    main()
