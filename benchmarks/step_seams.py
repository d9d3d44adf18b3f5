"""A step as a program of subgraphs beside the same step as one whole graph: milliseconds, in turns in one process.

    python benchmarks/step_seams.py [--layers 30] [--rounds 30]

Shapes of SmolLM2-135M with random weights, one layer as the draft, greedy. Compiles both forms first: minutes.
"""

from __future__ import annotations

import argparse
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
from pipeline.recipe.schema import InductorSettings  # noqa: E402
from support.graphs import compile_graph  # noqa: E402
from support.pairs import make_pair  # noqa: E402

SPECS = (GraphSpec("decode", 1, 1, 1024), GraphSpec("decode", 4, 1, 1024), GraphSpec("speculate", 1, 5, 1024, 4))


def both(backend: InductorBackend, spec: GraphSpec, pair: PairSpec) -> tuple[LoadedGraph, LoadedGraph]:
    """Compile a graph as a program and as a whole."""
    io = signature(spec, pair, backend.packing)
    with torch.no_grad():
        program = torch.export.export(GraphModule(spec, pair, io, backend.seams), (empty(io.inputs),), strict=False)
    loaded = []
    for traced in (backend.trace(spec, pair), Traced(canonical(program).encode(), io, program)):
        with tempfile.TemporaryDirectory() as work:
            compile_graph(backend, traced, Path(work))
            loaded.append(LoadedGraph(Path(work, backend.graph_file), "cpu"))
    return loaded[0], loaded[1]


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


def milliseconds(run: Callable[[], object]) -> float:
    """Return the time of one call."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Compile, run in turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    target = replace(
        make_pair().shape.target, family="llama", layers=options.layers, hidden=576, intermediate=1536, heads=9,
        kv_heads=3, head_dim=64, vocab=49152, qk_norm=False,
    )  # fmt: skip
    models = ModelsSpec(target, replace(target, layers=1), "bfloat16", "bfloat16", tp=1, draft_replicated=False)
    pair, backend = PairSpec(models, rows=4, length=1024), InductorBackend(InductorSettings())
    print(f"{'':32}  whole, ms   subgraphs, ms   subgraphs / whole")
    for spec in SPECS:
        subgraphs, whole = both(backend, spec, pair)
        inputs = inputs_of(spec, pair, backend)
        times: dict[LoadedGraph, list[float]] = {subgraphs: [], whole: []}
        for turn in range(options.rounds):
            for graph in (subgraphs, whole) if turn % 2 else (whole, subgraphs):
                times[graph] += [milliseconds(partial(graph.run, inputs)) for _ in range(6)][1:]
        one, other = median(times[whole]), median(times[subgraphs])
        print(f"{spec.name:32}{one:11.2f}{other:12.2f}{other / one:16.3f}", flush=True)


if __name__ == "__main__":
    main()
