"""A small module that calls our kernels, compiled as the backend compiles a graph: same settings, same headers."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.backends.base import Traced
from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.signature import Signature
from pipeline.recipe.schema import InductorSettings


def compiled(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], work: Path, isa: str = "native") -> LoadedGraph:
    """The module's graph, compiled in `work` and opened."""
    backend = InductorBackend(InductorSettings(isa=isa))
    program = torch.export.export(module, inputs)
    backend.compile(Traced(str(work).encode(), Signature((), (), (), ()), program), work)
    return LoadedGraph(work / backend.graph_file, "cpu")
