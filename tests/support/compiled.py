"""Small modules that call our kernels, compiled as the backend compiles a graph: same settings, same headers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch._inductor.config
from torch import Tensor

from pipeline.backends.base import Traced
from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.signature import Signature
from pipeline.recipe.backend_settings import InductorSettings

Name = TypeVar("Name", bound=Hashable)
Case = tuple[torch.nn.Module, tuple[Tensor, ...]]
"""A module that returns a tuple of tensors, and its inputs."""


class SideBySide(torch.nn.Module):
    """Modules that share nothing, as one: their inputs and their outputs in a row."""

    def __init__(self, modules: list[torch.nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.parts, self.counts = modules, counts

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rest, outputs = list(inputs), []
        for module, count in zip(self.parts, self.counts, strict=True):
            outputs += module(*rest[:count])
            del rest[:count]
        return tuple(outputs)


def run_compiled(
    cases: Mapping[Name, Case], work: Path, isa: str = "native", *, precompile: bool = True
) -> dict[Name, list[Tensor]]:
    """Compile all cases as one graph in `work`, which costs little more than one of them, and run it once.

    Inputs that a module writes to are written to. Headers are precompiled for the instruction set of builds alone: for
    one graph they cost more than they save.
    """
    modules, inputs = [module for module, _ in cases.values()], [x for _, given in cases.values() for x in given]
    graph = SideBySide(modules, [len(given) for _, given in cases.values()])
    counts = [len(module(*(x.clone() for x in given))) for module, given in cases.values()]
    backend = InductorBackend(InductorSettings(isa=isa))
    program = torch.export.export(graph, tuple(x.clone() for x in inputs))
    with torch._inductor.config.patch(cpp_cache_precompile_headers=precompile and isa == InductorSettings().isa):
        backend.compile(Traced(str(work).encode(), Signature((), (), (), ()), program), work)
    outputs = list(LoadedGraph(work / backend.graph_file, "cpu").run(inputs))
    return {name: [outputs.pop(0) for _ in range(count)] for name, count in zip(cases, counts, strict=True)}
