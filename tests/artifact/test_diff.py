"""What differs between two artifacts."""

from __future__ import annotations

from pipeline.artifact.diff import diff
from pipeline.artifact.manifest import read
from support import small_artifacts as small


def test_diff_equal(made):
    assert diff(read(made).manifest, read(made).manifest) == {"fields": {}, "files": {}}


def test_diff_names_what_changed(tmp_path):
    one = small.make(tmp_path / "1", tmp_path / "work").manifest
    two = small.make_validated(tmp_path / "2", tmp_path / "work", weights=b"new", graph=b"new").manifest
    two = two.model_copy(update={"toolchain": {**two.toolchain, "torch": "2.14.0"}})
    found = diff(one, two)
    assert found["fields"]["toolchain.torch"] == {"from": "2.13.0+cpu", "to": "2.14.0"}
    assert found["fields"]["validation.passed"] == {"from": None, "to": True}
    assert found["files"]["weights"] == {
        "changed": [f"weights/{m}/rank-0-of-1.safetensors" for m in ("draft", "target")]
    }
    assert found["files"]["graphs"]["changed"] == [g.file for g in sorted(one.graphs, key=lambda g: g.name)]
    assert found["files"]["reports"] == {"added": ["reports/parity.json"]}


def test_diff_names_graphs_of_another_recipe(made, tmp_path, monkeypatch):
    changed = {**small.RECIPE, "speculation": {"draft_tokens": [2, 3]}}
    monkeypatch.setattr(small, "RECIPE", changed)
    other = small.make(tmp_path / "other", tmp_path / "work")
    found = diff(read(made).manifest, other.manifest)
    assert found["files"]["graphs"]["added"] == [
        f"graphs/speculate-b1-t4-s32-k3/{name}" for name in ("flags.json", "graph.bin", "io.json")
    ]
