"""Small modules that call our kernels, compiled as the backend compiles a graph: same settings, same headers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch._inductor.config
from torch import Tensor

from pipeline.backends.base import Traced
from pipeline.backends.inductor.backend import InductorBackend, _subgraphs, graph_text
from pipeline.backends.inductor.program import program_of
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.backends.inductor.subgraphs import SubgraphTracer
from pipeline.graphs.signature import Signature
from pipeline.recipe.backend_settings import InductorSettings
from support.graphs import compile_graph

Name = TypeVar("Name", bound=Hashable)
Case = tuple[torch.nn.Module, tuple[Tensor, ...]]
"""A module that returns a tuple of tensors, and its inputs."""


def run_compiled(
    cases: Mapping[Name, Case], work: Path, isa: str = "native", *, precompile: bool = True
) -> dict[Name, list[Tensor]]:
    """Compile all cases as one subgraph in `work`, which costs little more than one of them, and run it once.

    Inputs that a module writes to are written to. Headers are precompiled for the instruction set of builds alone: for
    one graph they cost more than they save.
    """
    inputs = [x for _, given in cases.values() for x in given]
    counts = [len(module(*(x.clone() for x in given))) for module, given in cases.values()]

    def side_by_side(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        return tuple(out for module, given in cases.values() for out in module(*(next(rest) for _ in given)))

    backend, tracer = InductorBackend(InductorSettings(isa=isa)), SubgraphTracer(graph_text)
    program = program_of(side_by_side, tracer, [x.clone() for x in inputs], graph_text)
    traced = Traced(program.text().encode(), Signature((), (), (), ()), program, tuple(_subgraphs(program)))
    with torch._inductor.config.patch(cpp_cache_precompile_headers=precompile and isa == InductorSettings().isa):
        compile_graph(backend, traced, work)
    outputs = list(LoadedGraph(work / backend.graph_file, "cpu").run(inputs))
    return {name: [outputs.pop(0) for _ in range(count)] for name, count in zip(cases, counts, strict=True)}
