"""Files whose digest decides whether a graph is traced again: no code that shapes a graph may be outside of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import grimp
import pytest
import torch

import pipeline
from pipeline.backends.base import make_backend, package_of
from pipeline.backends.inductor.backend import InductorBackend
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import GraphModule
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.families import config_of
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from pipeline.stages import compile as stage
from support.pairs import SMALL, make_pair

ROOT = Path(pipeline.__file__).parent
INDUCTOR, NEURON = package_of(InductorSettings()), package_of(NeuronSettings(name="neuron", target="trn2"))

HEAD = SMALL | {
    "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 40,
    "shares_embedding": True, "tie_word_embeddings": False,
}  # fmt: skip

CANNOT_SHAPE = {
    "artifact/manifest.py": "types of artifacts, which exist after compiling",
    "cache/local.py": "the folder of caches",
    "errors.py": "types of errors",
    "extras.py": "names packages that are not installed",
    "addresses.py": "texts of addresses",
    "files/atomic.py": "writes files",
    "files/durable.py": "syncs folders",
    "files/home.py": "folders of accounts",
    "files/limits.py": "limits of documents",
    "files/temporary.py": "the folder of compilers; no graph depends on it but by paths in its library",
    "files/unfinished.py": "names and locks of temporary files",
    "recipe/backend_settings.py": "types of settings, which are in the key (Backend.flags)",
    "recipe/chips.py": "facts of Neuron chips; the settings that follow from them are in the key (Backend.flags)",
    "recipe/document.py": "positions in YAML files",
    "recipe/readings.py": "types of keys of a recipe; what they select is in the configs (PairSpec)",
    "recipe/schema.py": "the recipe's types; the settings themselves are in the key (Backend.flags, PairSpec)",
    "recipe/step_costs.py": "costs by which the runtime chooses K",
    "recipe/syntax.py": "text of YAML files",
    "progress.py": "types of callbacks",
    "records.py": "base class of records",
}
"""Modules that code which shapes graphs imports, and why a change to each cannot change a graph under its key."""


def uncovered(files: Iterable[str], backend: str = INDUCTOR) -> list[str]:
    """Files of the package, relative to it, that neither shape graphs by `shaping_files` nor are known not to."""
    covered = {path.relative_to(ROOT).as_posix() for path in stage.shaping_files(backend)}
    return sorted(set(files) - covered - set(CANNOT_SHAPE))


def executed(function: Callable[[], Any]) -> set[str]:
    """Files of the package whose functions run during a call."""
    codes = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    paths = {Path(code.co_filename) for code in codes}
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)}


@pytest.fixture(scope="module")
def traced() -> set[str]:
    """Files that run while the graphs of a draft model and of an EAGLE-3 head are traced.

    One graph is really traced, as small as can be: under a profiler that takes seconds. Tracing the others runs the
    same code as running their modules does.
    """
    backend, model = InductorBackend(InductorSettings()), make_pair("all").shape
    one_layer = replace(model, models=replace(model.models, target=replace(model.target, layers=1)))
    target = config_of(SMALL | {"num_hidden_layers": 6}, "target")
    head = ModelsSpec(target, config_of(HEAD, "head"), "float32", "float32", 1, draft_replicated=True)
    speculate = GraphSpec("speculate", 1, 2, 32, draft_tokens=1, sampling="stochastic")

    def run(spec: GraphSpec, pair: PairSpec) -> None:
        io = signature(spec, pair, backend.packing)
        zeros = [torch.zeros(tensor.shape, dtype=torch_dtype(tensor.dtype)) for tensor in io.inputs]
        with torch.no_grad():
            GraphModule(spec, pair, io, backend.seams)(zeros)

    def trace() -> None:
        make_backend(InductorSettings()).trace(GraphSpec("decode", 1, 1, 32), one_layer)
        for spec in (GraphSpec("prefill", 1, 16, 40), GraphSpec("score", 1, 4, 32, model="draft"), speculate):
            run(spec, replace(model, candidates=8))
            run(spec, PairSpec(head, 4, 40, candidates=8, lookup=True))

    return executed(trace)


@cache
def imported(backend: str) -> set[str]:
    """Files that a traced graph and its backend import, directly or not."""
    graph = grimp.build_graph("pipeline", exclude_type_checking_imports=True)
    roots = {"pipeline.graphs.module", backend, *graph.find_descendants(backend)}
    modules = roots.union(*(graph.find_upstream_modules(root) for root in roots))
    paths = [ROOT.parent / module.replace(".", "/") for module in modules]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths]
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_every_file_that_runs_during_a_trace_is_covered(traced):
    """The list was kept by hand, and a file left off it served stale graphs after a change."""
    assert {"models/decoder.py", "models/eagle3_layer.py", "speculation/phases.py", "graphs/module.py"} <= traced
    assert uncovered(traced) == []


@pytest.mark.parametrize(
    ("backend", "own"), [(INDUCTOR, "backends/inductor/vectors.py"), (NEURON, "backends/neuron/hlo.py")]
)
def test_every_module_that_a_traced_graph_imports_is_covered(backend, own):
    """Constants of a module shape graphs too, and no function of it runs during a trace."""
    assert {"models/weights.py", "graphs/packing.py", own} <= imported(backend)
    assert uncovered(imported(backend), backend) == []


@pytest.mark.parametrize("part", stage.SHAPING)
def test_a_part_left_off_is_reported(part, traced, monkeypatch):
    monkeypatch.setattr(stage, "SHAPING", tuple(other for other in stage.SHAPING if other != part))
    for files in (traced, imported(INDUCTOR)):
        assert uncovered(files), part
        assert all(file.startswith(part) for file in uncovered(files))


def test_the_list_of_exceptions_has_no_file_that_nothing_imports():
    assert set(CANNOT_SHAPE) <= imported(INDUCTOR) | imported(NEURON)


def test_estimates_follow_the_times_of_finished_graphs():
    """A graph that takes twice its estimate doubles the others' estimates; a graph from a cache changes none."""
    specs = [GraphSpec("decode", 1, 1, length) for length in (16, 32, 64)]
    tally = stage._Tally({spec.name: 60.0 for spec in specs}, 1)
    assert tally.remaining() == "about 3 min 0 s"
    tally.end(stage.Compiled(specs[0], "key", hit=True, seconds=0.1))
    assert tally.remaining() == "about 2 min 0 s"
    slow = stage.Compiled(specs[1], "key", hit=False, seconds=120.0)
    tally.end(slow)
    assert tally.line(slow) == f"{specs[1].name}: 2 min 0 s, 1 left, about 2 min 0 s"
