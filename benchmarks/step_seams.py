"""A step as a program of subgraphs beside the same step as one whole graph: milliseconds, in turns in one process.

    python benchmarks/step_seams.py [--layers 30] [--rounds 30] [--save DIR] [--beside DIR] [--processor-time]

Shapes of SmolLM2-135M with random weights, one layer as the draft, greedy. Compiles both forms first: minutes. `--save`
keeps the programs; `--beside` runs those of another commit too. `--processor-time`, with OMP_NUM_THREADS=1, is the time
of the calling thread, which other processes disturb little.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline.backends.base import Traced  # noqa: E402 - after the path
from pipeline.backends.inductor.backend import InductorBackend, canonical  # noqa: E402
from pipeline.backends.inductor.session import LoadedGraph  # noqa: E402
from pipeline.graphs.dtypes import torch_dtype  # noqa: E402
from pipeline.graphs.module import GraphModule, empty  # noqa: E402
from pipeline.graphs.signature import signature  # noqa: E402
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec  # noqa: E402
from pipeline.models.config import Layer  # noqa: E402
from pipeline.models.rope_types import Rope  # noqa: E402
from pipeline.recipe.backend_settings import InductorSettings  # noqa: E402
from support.graphs import compile_graph  # noqa: E402
from support.pairs import make_pair  # noqa: E402

SPECS = (GraphSpec("decode", 1, 1, 1024), GraphSpec("decode", 4, 1, 1024), GraphSpec("speculate", 1, 5, 1024, 4))


def compiled(backend: InductorBackend, traced: Traced, kept: Path) -> LoadedGraph:
    """Return a compiled graph, kept in a file."""
    if not kept.exists():
        with tempfile.TemporaryDirectory() as work:
            compile_graph(backend, traced, Path(work))
            shutil.copy(Path(work, backend.graph_file), kept)
    return LoadedGraph(kept, "cpu")


def forms(backend: InductorBackend, spec: GraphSpec, pair: PairSpec, options: Options) -> dict[str, LoadedGraph]:
    """Compile a graph as a whole and as a program; load the program of another commit as well."""
    io = signature(spec, pair, backend.packing)
    with torch.no_grad():
        whole = torch.export.export(GraphModule(spec, pair, io, backend.seams), (empty(io.inputs),), strict=False)
    traced = Traced(canonical(whole).encode(), io, whole)
    loaded = {
        "whole": compiled(backend, traced, options.save / f"{spec.name}-whole.pt2"),
        "subgraphs": compiled(backend, backend.trace(spec, pair), options.save / f"{spec.name}.pt2"),
    }
    if options.beside:
        loaded["beside"] = LoadedGraph(options.beside / f"{spec.name}.pt2", "cpu")
    return loaded


def inputs_of(spec: GraphSpec, pair: PairSpec, backend: InductorBackend) -> list[Tensor]:
    """Return random weights and caches, and rows at position 200."""
    inputs = []
    for tensor in signature(spec, pair, backend.packing).inputs:
        dtype = torch_dtype(tensor.dtype)
        value = (
            torch.randn(tensor.shape).to(dtype) / 30
            if dtype.is_floating_point
            else torch.ones(tensor.shape, dtype=dtype)
        )
        inputs.append(value * 200 if tensor.name == "position" else value)
    return inputs


def milliseconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the time of one call."""
    started = clock()
    run()
    return (clock() - started) * 1e3


class Options(argparse.Namespace):
    """The arguments."""

    layers: int
    rounds: int
    save: Path
    beside: Path | None
    processor_time: bool


def parsed() -> Options:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--processor-time", action="store_true")
    return parser.parse_args(namespace=Options())


def main() -> None:
    """Compile, run in turns, and print medians."""
    options = parsed()
    options.save.mkdir(parents=True, exist_ok=True)
    target = replace(
        make_pair().shape.target, family="llama", layers=options.layers, hidden=576, intermediate=1536, heads=9,
        kv_heads=3, head_dim=64, vocab=49152, qk_norm=None, kinds=(Layer(Rope(1e4, 64)),),
    )  # fmt: skip
    models = ModelsSpec(target, replace(target, layers=1), "bfloat16", "bfloat16", tp=1, draft_replicated=False)
    pair, backend = PairSpec(models, rows=4, length=1024), InductorBackend(InductorSettings())
    clock = time.thread_time if options.processor_time else time.perf_counter
    for spec in SPECS:
        graphs = forms(backend, spec, pair, options)
        inputs = inputs_of(spec, pair, backend)
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(options.rounds):
            order = [*graphs] if turn % 2 else [*reversed(graphs)]
            for name in order:
                times[name] += [milliseconds(partial(graphs[name].run, inputs), clock) for _ in range(6)][1:]
        ms = {name: median(of) for name, of in times.items()}
        ratios = ", ".join(f"{name} {ms[name]:.2f} ms ({ms[name] / ms['whole']:.3f})" for name in ms)
        print(f"{spec.name}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
