"""The inductor backend's dealings with the compiler; what it computes is tested elsewhere."""

from __future__ import annotations

import pytest
from filelock import FileLock

from pipeline.backends.inductor import whole_headers


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


def test_whole_headers_does_not_trust_those_of_a_compile_that_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_headers(tmp_path):
        (tmp_path / "new.h.gch").write_bytes(b"perhaps broken")
        1 / 0  # noqa: B018 - stands for a compiler that fails
    assert not list(tmp_path.glob("*.whole"))
