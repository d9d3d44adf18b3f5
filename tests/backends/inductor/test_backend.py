"""The inductor backend's dealings with the compiler; what it computes is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from torch._inductor import codecache

from pipeline.backends.inductor.scratch import scratch, whole_headers
from support.paths import PYTHONPATH


class Header:
    """A header to precompile, as Inductor describes one."""

    def __init__(self, path: Path, *, fails: bool = False) -> None:
        self.path, self.fails, self.builds = path, fails, 0

    def get_target_file_path(self) -> str:
        return str(self.path)

    def build(self) -> None:
        self.builds += 1
        self.path.write_bytes(b"half")
        if self.fails:
            raise ChildProcessError("stands for a compiler that fails")
        self.path.write_bytes(b"whole")


def precompile(header: Header) -> None:
    """Compile a header as Inductor does, within its locks."""
    locks = header.path.parent / "locks"
    locks.mkdir(exist_ok=True)
    codecache._worker_compile_cpp(str(locks / f"{header.path.name.split('.')[0]}.lock"), (header,))


@pytest.mark.parametrize("ending", ["gch", "pch"])
def test_whole_headers_removes_what_a_killed_compiler_left(tmp_path: Path, ending: str) -> None:
    """Inductor trusts any precompiled header that exists; half of one, of GCC or Clang, would fail every compile."""
    (tmp_path / "locks").mkdir()
    for name in ("left", "busy", "good"):
        (tmp_path / f"{name}.h").write_text("#include <vector>\n")
        (tmp_path / f"{name}.h.{ending}").write_bytes(b"half")
    (tmp_path / "good.h.whole").touch()
    with FileLock(tmp_path / "locks/busy.lock.whole"), whole_headers(tmp_path):
        assert sorted(path.name for path in tmp_path.glob(f"*.{ending}")) == [f"busy.h.{ending}", f"good.h.{ending}"]
    with whole_headers(tmp_path):
        assert [path.name for path in tmp_path.glob(f"*.{ending}")] == [f"good.h.{ending}"]


def test_whole_headers_keeps_a_header_while_the_graph_that_made_it_is_compiled(tmp_path: Path) -> None:
    """It was marked at the end of the graph: another worker that began meanwhile removed it, and compiled it again."""
    header = Header(tmp_path / "new.h.gch")
    with whole_headers(tmp_path):
        precompile(header)
        with whole_headers(tmp_path):
            assert header.path.is_file()
    with whole_headers(tmp_path):
        precompile(header)
    assert header.builds == 1


def test_whole_headers_does_not_trust_one_whose_compiler_failed(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError), whole_headers(tmp_path):
        precompile(Header(tmp_path / "new.h.gch", fails=True))
    with whole_headers(tmp_path):
        assert not list(tmp_path.glob("new.h.gch"))


def test_whole_headers_removes_what_no_compile_used_for_a_week(tmp_path: Path) -> None:
    """Each takes 130 MB; those of an earlier compiler, torch or project stayed for ever."""
    for folder, name, days in (("now", "used", 6), ("now", "old", 8), ("before", "old", 8)):
        header = tmp_path / folder / f"{name}.h.gch"
        header.parent.mkdir(exist_ok=True)
        header.touch()
        mark = header.with_suffix(".whole")
        mark.touch()
        os.utime(mark, (0, time.time() - days * 24 * 3600))
    with whole_headers(tmp_path / "now"):
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.gch")] == ["now/used.h.gch"]
        precompile(Header(tmp_path / "now/used.h.gch"))
    assert time.time() - (tmp_path / "now/used.h.whole").stat().st_mtime < 3600


def test_scratch_is_empty_at_first_and_gone_at_the_end(tmp_path):
    """Sources that an earlier compile left were taken, and grew: one graph compiled twice was two packages."""
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "left.cpp").write_text("// by a killed compiler")
    with scratch(tmp_path / "graph"):
        assert list((tmp_path / "graph").iterdir()) == []
        (tmp_path / "graph" / "new.cpp").touch()
    assert not (tmp_path / "graph").exists()


@pytest.mark.slow
def test_compile_twice_is_the_same_bytes(tmp_path):
    """In one process and in another, with other thread counts, whatever was compiled before."""
    code = (
        "import hashlib, pathlib, sys, torch\n"
        "from support.graphs import compile_graph\n"
        "from support.pairs import make_pair\nfrom pipeline.backends.base import make_backend\n"
        "from pipeline.recipe.schema import InductorSettings\n"
        "from pipeline.graphs.spec import GraphSpec\n"
        "backend = make_backend(InductorSettings())\n"
        "specs = {'score': GraphSpec('score', 1, 4, 40, model='draft'), 'decode': GraphSpec('decode', 1, 1, 40)}\n"
        "for threads, phase in enumerate(sys.argv[1:], 1):\n"
        "    torch.set_num_threads(threads)\n"
        "    traced = backend.trace(specs[phase], make_pair().shape)\n"
        "    data = compile_graph(backend, traced, pathlib.Path.cwd() / f'{phase}-{threads}')\n"
        "    print(phase, hashlib.sha256(data).hexdigest())\n"
    )
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    found = set()
    for phases in (("score", "decode", "score"), ("decode", "score")):
        folder = tmp_path / "-".join(phases)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, *phases], cwd=folder, env=env, capture_output=True, text=True, check=True
        )
        found |= set(done.stdout.splitlines())
    assert len(found) == 2
