"""Packages of graphs: what the loader would extract outside of its folder is refused before it sees the package."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pipeline.backends.inductor.session import LoadedGraph
from pipeline.errors import ArtifactError, HostError

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
