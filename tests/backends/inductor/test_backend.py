"""The inductor backend's dealings with the compiler; what it computes is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from filelock import FileLock

from pipeline.backends.inductor.scratch import scratch, whole_headers
from support.paths import PYTHONPATH


def test_whole_headers_removes_what_a_killed_compiler_left(tmp_path):
    """Inductor trusts any precompiled header that exists; half of one would fail every later compile."""
    (tmp_path / "locks").mkdir()
    for name in ("left", "busy", "good"):
        (tmp_path / f"{name}.h").write_text("#include <vector>\n")
        (tmp_path / f"{name}.h.gch").write_bytes(b"half")
    (tmp_path / "good.h.whole").touch()
    with FileLock(tmp_path / "locks" / "busy.lock"), whole_headers(tmp_path):
        assert sorted(path.name for path in tmp_path.glob("*.gch")) == ["busy.h.gch", "good.h.gch"]
        (tmp_path / "new.h.gch").write_bytes(b"written by this compile")
    assert sorted(path.name for path in tmp_path.glob("*.whole")) == ["good.h.whole", "new.h.whole"]
    with whole_headers(tmp_path):
        assert sorted(path.name for path in tmp_path.glob("*.gch")) == ["good.h.gch", "new.h.gch"]


def test_whole_headers_knows_those_of_clang(tmp_path):
    """Only GCC's `.gch` were looked for: half a header of Clang failed every later compile."""
    (tmp_path / "left.h.pch").write_bytes(b"half")
    with whole_headers(tmp_path):
        assert not (tmp_path / "left.h.pch").exists()
        (tmp_path / "new.h.pch").write_bytes(b"written by this compile")
    assert (tmp_path / "new.h.whole").exists()


def test_whole_headers_does_not_trust_those_of_a_compile_that_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_headers(tmp_path):
        (tmp_path / "new.h.gch").write_bytes(b"perhaps broken")
        1 / 0  # noqa: B018 - stands for a compiler that fails
    assert not list(tmp_path.glob("*.whole"))


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
