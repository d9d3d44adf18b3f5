"""Compiled subgraphs, called by a program: their inputs stay those of the caller, and results are new."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.backends.base import Traced
from pipeline.backends.inductor.backend import InductorBackend, _subgraphs, graph_text
from pipeline.backends.inductor.program import program_of
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.backends.inductor.subgraphs import SubgraphTracer
from pipeline.recipe.backend_settings import InductorSettings
from support.graphs import compile_graph

pytestmark = pytest.mark.compile


def marked(kept, twice, state):
    """Return an input as it is, a result, and the state after it was written in place."""
    state.add_(kept)
    return kept, twice * 2 + state


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> LoadedGraph:
    """A program of two calls of one function, the second on the results of the first."""
    backend, tracer = InductorBackend(InductorSettings()), SubgraphTracer(graph_text)

    def phase(tensors):
        first, second, state = tensors
        kept, result = tracer.call(marked, first, second, state)
        again, last = tracer.call(marked, result, kept, state)
        return again, last, kept

    program = program_of(phase, tracer, [torch.ones(2, 8) for _ in range(3)], graph_text)
    assert len({call.subgraph for call in program.calls}) == 1
    traced = Traced(program.text().encode(), SimpleNamespace(), program, tuple(_subgraphs(program)))  # type: ignore[arg-type]
    work: Path = tmp_path_factory.mktemp("program")
    compile_graph(backend, traced, work)
    return LoadedGraph(work / backend.graph_file, "cpu")


def test_inputs_stay_those_of_the_caller_and_are_written_in_place(graph):
    """Calls borrow their inputs: a handle that a call ended as well would be freed twice."""
    first, second, state = (torch.full((2, 8), float(value)) for value in (1, 2, 3))
    for step in range(1, 4):
        state.fill_(3)
        again, last, kept = graph.run([first, second, state])
        assert first.eq(1).all()
        assert second.eq(2).all()
        assert kept.eq(1).all()
        assert again.eq(8).all()  # 2 * 2 + (3 + 1)
        assert state.eq(12).all()  # 4 + 8
        assert last.eq(14).all(), step  # 1 * 2 + 12


def test_results_outlive_the_inputs(graph):
    results = graph.run([torch.full((2, 8), 1.0), torch.full((2, 8), 2.0), torch.full((2, 8), 3.0)])
    _overwritten = [torch.full((2, 8), -1.0) for _ in range(64)]
    assert [float(result[0, 0]) for result in results] == [8, 14, 1]


def test_no_call_makes_handles_of_its_inputs():
    """Each did for all of them: 21 a layer of a decoder, 2% of a step with the other costs of a call."""
    from pipeline.backends.inductor import subgraph_objects

    backend = InductorBackend(InductorSettings())
    tracer = SubgraphTracer(graph_text)
    program = program_of(
        lambda tensors: tracer.call(marked, *tensors), tracer, [torch.ones(2, 8) for _ in range(3)], graph_text
    )
    (subgraph,) = program.subgraphs.values()
    with backend.inductor(subgraph.ir):
        text = subgraph_objects.source(subgraph, subgraph_objects.generated(subgraph))
    assert "aoti_torch_new_tensor_handle" not in text
    assert "steal_from_raw_handles" not in text
    assert text.count("tandem::Inputs{input_handles}") == 1
