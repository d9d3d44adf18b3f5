"""Subgraphs that graphs share: each compiled once, by whichever worker comes first."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends.base import Toolchain, Traced, TracedSubgraph, cache_key
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.errors import HostError
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.stages.compile import Job, compiled_subgraphs
from support.pairs import make_pair


class Compiler:
    """Stands for a backend: a subgraph's object file is its name."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def toolchain(self) -> Toolchain:
        return Toolchain("stand-in", {})

    def flags(self) -> dict[str, str]:
        return {}

    def compile_subgraph(self, subgraph: TracedSubgraph, work: Path) -> bytes:
        assert not list(work.iterdir())
        self.compiled.append(subgraph.name)
        if subgraph.name == "broken":
            raise HostError("the C++ compiler failed")
        return subgraph.name.encode()


def job(folder: Path) -> Job:
    spec = GraphSpec("decode", 1, 1, 40)
    return Job(spec, make_pair().shape, InductorSettings(), folder / "cache", folder / "decode.log")


def traced(*names: str) -> Traced:
    subgraphs = tuple(TracedSubgraph(name, name.encode()) for name in names)
    return Traced(b"graph", Signature((), (), (), ()), subgraphs=subgraphs)


def key(backend: Any, name: str) -> str:
    return cache_key(TracedSubgraph(name, name.encode()), backend.toolchain(), backend.flags())


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_two_graphs_share_a_subgraph(tmp_path):
    backend: Any = Compiler()
    first = compiled_subgraphs(job(tmp_path), backend, traced("layer", "entry"), folder(tmp_path / "one"))
    second = compiled_subgraphs(job(tmp_path), backend, traced("layer", "verify"), folder(tmp_path / "two"))
    assert backend.compiled == ["layer", "entry", "verify"]
    assert first is not None
    assert second is not None
    assert {file.name: file.read_text() for file in second.iterdir()} == {"layer.o": "layer", "verify.o": "verify"}
    assert (first / "layer.o").samefile(second / "layer.o")  # linked, not copied


def test_a_killed_worker_leaves_what_it_compiled(tmp_path):
    """Killed in the middle of a subgraph: those before it stay, and its lock is free."""

    class Killed(Compiler):
        def compile_subgraph(self, subgraph: TracedSubgraph, work: Path) -> bytes:
            if subgraph.name == "entry":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compile_subgraph(subgraph, work)

    child = os.fork()
    if child == 0:
        killed: Any = Killed()
        compiled_subgraphs(job(tmp_path), killed, traced("layer", "entry", "verify"), folder(tmp_path / "one"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    backend: Any = Compiler()
    objects = compiled_subgraphs(job(tmp_path), backend, traced("layer", "entry", "verify"), folder(tmp_path / "two"))
    assert backend.compiled == ["entry", "verify"]
    assert objects is not None
    assert sorted(file.name for file in objects.iterdir()) == ["entry.o", "layer.o", "verify.o"]


def test_machines_share_subgraphs(tmp_path):
    """Only graphs were shared: a graph with another bucket compiled every layer again."""
    builder: Any = Compiler()
    shared = Remote(str(tmp_path / "shared"), "write")
    compiled_subgraphs(replace(job(tmp_path / "a"), remote=shared), builder, traced("layer"), folder(tmp_path / "one"))
    other: Any = Compiler()
    reader = replace(job(tmp_path / "b"), remote=Remote(shared.url))
    objects = compiled_subgraphs(reader, other, traced("layer", "entry"), folder(tmp_path / "two"))
    assert (builder.compiled, other.compiled) == (["layer"], ["entry"])
    assert objects is not None
    assert (objects / "layer.o").read_bytes() == b"layer"
    stored = [entry.key for entry, _ in shared.open("subgraphs").entries()]
    assert stored == [key(builder, "layer")]  # a reader writes nothing


def test_a_damaged_subgraph_is_compiled_again(tmp_path):
    backend: Any = Compiler()
    compiled_subgraphs(job(tmp_path), backend, traced("layer"), folder(tmp_path / "one"))
    stored = Cache(tmp_path / "cache", "subgraphs").get(key(backend, "layer"))
    assert stored is not None
    stored.write_bytes(b"LAYER")
    again = compiled_subgraphs(job(tmp_path), backend, traced("layer"), folder(tmp_path / "two"))
    assert backend.compiled == ["layer", "layer"]
    assert again is not None
    assert (again / "layer.o").read_bytes() == b"layer"


def test_a_subgraph_that_another_worker_compiles_is_left_to_the_end(tmp_path):
    backend: Any = Compiler()
    cache, done = Cache(tmp_path / "cache", "subgraphs"), threading.Event()
    with cache.lock(key(backend, "layer")):
        worker = threading.Thread(
            target=lambda: (
                compiled_subgraphs(
                    job(tmp_path), backend, traced("layer", "entry", "verify"), folder(tmp_path / "one")
                ),
                done.set(),
            )
        )
        worker.start()
        assert not done.wait(1)
        assert backend.compiled == ["entry", "verify"]
        cache.put(key(backend, "layer"), b"by the other worker")
    assert done.wait(10)
    worker.join()
    assert backend.compiled == ["entry", "verify"]
    assert (tmp_path / "one/subgraphs/layer.o").read_bytes() == b"by the other worker"


def test_a_failure_names_the_graph_and_its_log(tmp_path):
    backend: Any = Compiler()
    with pytest.raises(HostError) as raised:
        compiled_subgraphs(job(tmp_path), backend, traced("layer", "broken"), folder(tmp_path / "one"))
    assert "compile decode-b1-t1-s40: the C++ compiler failed" in str(raised.value)
    assert "decode.log" in raised.value.fix
    assert Cache(tmp_path / "cache", "subgraphs").get(key(backend, "layer")) is not None  # stays


def test_a_graph_without_subgraphs_has_no_folder(tmp_path):
    backend: Any = Compiler()
    assert compiled_subgraphs(job(tmp_path), backend, traced(), folder(tmp_path / "one")) is None
