"""Packages of graphs: what the loader would extract outside of its folder is refused before it sees the package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.backends.inductor.session import LoadedGraph
from pipeline.errors import ArtifactError, HostError
from support.compiled import run_compiled

INSIDE = "graph/data/aotinductor/model/model.so"


@pytest.mark.parametrize(
    "name",
    ["graph/data/aotinductor/model/../../../../../../ESCAPED", "/ESCAPED", "graph/\\..\\ESCAPED", "a/" * 40 + "b"],
)
def test_a_member_that_leaves_the_folder_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's loader wrote it where it said, before it looked at any file."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with zipfile.ZipFile(tmp_path / "graph.pt2", "w") as archive:
        archive.writestr(INSIDE, "x")
        archive.writestr(name, "x")
    with pytest.raises(ArtifactError, match=r"unsafe path|path of 81 characters"):
        LoadedGraph(tmp_path / "graph.pt2", "cpu")
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("graph.pt2", "temporary")]


def test_a_member_that_is_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("graph/data/aotinductor/model/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "graph.pt2", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ArtifactError, match="is a link"):
        LoadedGraph(tmp_path / "graph.pt2", "cpu")


def test_a_file_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.pt2").write_bytes(b"not a package")
    with pytest.raises(HostError, match="cannot load the graph: File is not a zip file"):
        LoadedGraph(tmp_path / "graph.pt2", "cpu")


class Doubled(torch.nn.Module):
    def forward(self, x):
        return (x * 2 + 1,)


LOAD = """
import os, signal, sys, torch
from pathlib import Path
from pipeline.backends.inductor.session import LoadedGraph
graph = LoadedGraph(Path(sys.argv[1]), "cpu")
assert graph.run([torch.ones(4)])[0].tolist() == [3.0] * 4
if sys.argv[2] == "end":
    del graph
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_extracted_graph(tmp_path: Path) -> None:
    """Every server that was killed left the libraries of all its graphs in TMPDIR."""
    work, temporary = tmp_path / "work", tmp_path / "t"
    work.mkdir()
    temporary.mkdir()
    run_compiled({"doubled": (Doubled(), (torch.ones(4),))}, work)
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[3])}
    for how, code in (("kill", -signal.SIGKILL), ("end", 0)):
        command = [sys.executable, "-c", LOAD, str(work / "graph.pt2"), how]
        assert subprocess.run(command, env=environment, check=False).returncode == code
        assert not [path for path in temporary.rglob("*") if path.is_file()]
        assert not list(temporary.glob("aotinductor*"))
