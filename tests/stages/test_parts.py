"""Parts that graphs share: each compiled once, by whichever worker comes first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends.base import Toolchain, Traced, TracedPart, cache_key
from pipeline.cache.local import Cache
from pipeline.errors import HostError
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.schema import InductorSettings
from pipeline.stages.compile import Job, compiled_parts
from support.pairs import make_pair


class Compiler:
    """Stands for a backend: a part's object file is its name."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def toolchain(self) -> Toolchain:
        return Toolchain("stand-in", {})

    def flags(self) -> dict[str, str]:
        return {}

    def compile_part(self, part: TracedPart, work: Path) -> bytes:
        assert not list(work.iterdir())
        self.compiled.append(part.name)
        if part.name == "broken":
            raise HostError("the C++ compiler failed")
        return part.name.encode()


def job(folder: Path) -> Job:
    spec = GraphSpec("decode", 1, 1, 40)
    return Job(spec, make_pair().shape, InductorSettings(), folder / "cache", folder / "decode.log")


def traced(*names: str) -> Traced:
    parts = tuple(TracedPart(name, name.encode()) for name in names)
    return Traced(b"graph", Signature((), (), (), ()), parts=parts)


def key(backend: Any, name: str) -> str:
    return cache_key(TracedPart(name, name.encode()), backend.toolchain(), backend.flags())


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_two_graphs_share_a_part(tmp_path):
    backend: Any = Compiler()
    first = compiled_parts(job(tmp_path), backend, traced("layer", "entry"), folder(tmp_path / "one"))
    second = compiled_parts(job(tmp_path), backend, traced("layer", "verify"), folder(tmp_path / "two"))
    assert backend.compiled == ["layer", "entry", "verify"]
    assert first is not None
    assert second is not None
    assert {file.name: file.read_text() for file in second.iterdir()} == {"layer.o": "layer", "verify.o": "verify"}
    assert (first / "layer.o").samefile(second / "layer.o")  # linked, not copied


def test_a_damaged_part_is_compiled_again(tmp_path):
    backend: Any = Compiler()
    compiled_parts(job(tmp_path), backend, traced("layer"), folder(tmp_path / "one"))
    stored = Cache(tmp_path / "cache", "parts").get(key(backend, "layer"))
    assert stored is not None
    stored.write_bytes(b"LAYER")
    again = compiled_parts(job(tmp_path), backend, traced("layer"), folder(tmp_path / "two"))
    assert backend.compiled == ["layer", "layer"]
    assert again is not None
    assert (again / "layer.o").read_bytes() == b"layer"


def test_a_part_that_another_worker_compiles_is_left_to_the_end(tmp_path):
    backend: Any = Compiler()
    cache, done = Cache(tmp_path / "cache", "parts"), threading.Event()
    with cache.lock(key(backend, "layer")):
        worker = threading.Thread(
            target=lambda: (
                compiled_parts(job(tmp_path), backend, traced("layer", "entry", "verify"), folder(tmp_path / "one")),
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
    assert (tmp_path / "one/parts/layer.o").read_bytes() == b"by the other worker"


def test_a_failure_names_the_graph_and_its_log(tmp_path):
    backend: Any = Compiler()
    with pytest.raises(HostError) as raised:
        compiled_parts(job(tmp_path), backend, traced("layer", "broken"), folder(tmp_path / "one"))
    assert "compile decode-b1-t1-s40: the C++ compiler failed" in str(raised.value)
    assert "decode.log" in raised.value.fix
    assert Cache(tmp_path / "cache", "parts").get(key(backend, "layer")) is not None  # stays


def test_a_graph_without_parts_has_no_folder(tmp_path):
    backend: Any = Compiler()
    assert compiled_parts(job(tmp_path), backend, traced(), folder(tmp_path / "one")) is None
