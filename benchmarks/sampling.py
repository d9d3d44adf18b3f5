"""What sampling from a whole vocabulary costs: `python benchmarks/sampling.py`. Medians in milliseconds.

The operator of a CPU graph, over all tokens, beside the plain code over the best 256 (a partial sort), compiled in one
graph, for the rows of a decode step (1), of a step with K=4 (5) and of eight such rows (40).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipeline.backends.base import Traced
from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.sample_all import sample_all
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.arguments import Choice
from pipeline.graphs.signature import Signature
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.speculation.sampling import Drawn, Vocabulary, sample_best
from pipeline.validate.gates.judge import words

VOCAB, KEEP, RUNS = 49_152, 256, 60
CHOICES = (Choice(), Choice(1.0), Choice(1.0, top_k=50), Choice(0.7, top_p=0.9), Choice(1.5, top_p=0.95))


class All(torch.nn.Module):
    """Sample from all tokens."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """Return the tokens."""
        return (sample_all(*tensors),)


class Best(torch.nn.Module):
    """Sample from the best tokens."""

    def forward(self, logits: Tensor, *drawn: Tensor) -> tuple[Tensor]:
        """Return the tokens."""
        return (sample_best(logits, Drawn(*drawn), Vocabulary(KEEP)),)


def arguments(rows: int, choice: Choice) -> list[Tensor]:
    """Return logits with the spread of a small model's, and settings."""
    ones = torch.ones(rows)
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 2.5
    seeds = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2)
    top_k = (ones * choice.top_k).int()
    settings = [ones * choice.temperature, top_k, ones * choice.top_p, seeds, torch.arange(rows, dtype=torch.int32)]
    return [logits, *settings, torch.arange(VOCAB, dtype=torch.int32)]


def compiled(module: torch.nn.Module, rows: int, work: Path) -> LoadedGraph:
    """Return a module as a graph of the backend."""
    backend = InductorBackend(InductorSettings())
    program = torch.export.export(module, tuple(arguments(rows, CHOICES[0])))
    backend.compile(Traced(b"", Signature((), (), (), ()), program), work)
    return LoadedGraph(work / backend.graph_file, "cpu")


def median_ms(graph: LoadedGraph, given: list[Tensor]) -> float:
    """Return the median time of a call, after five."""
    times = []
    for _ in range(RUNS + 5):
        started = time.perf_counter()
        graph.run(given)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[5:])


def main() -> None:
    """Print a row for each number of rows and settings."""
    for rows in (1, 5, 40):
        graphs = []
        for module in (All(), Best()):
            with tempfile.TemporaryDirectory() as folder:
                graphs.append(compiled(module, rows, Path(folder)))
        for choice in CHOICES:
            whole, best = (median_ms(graph, arguments(rows, choice)) for graph in graphs)
            print(f"{rows:>2} rows, {words(choice):<36} all tokens {whole:6.2f}   best {KEEP} {best:6.2f}", flush=True)


if __name__ == "__main__":
    main()
