"""Programs of `examples/` that compile nothing; the others are in `test_build.py` and `serve/test_vllm.py`."""

from __future__ import annotations

import runpy
import shutil

import pytest

from pipeline.artifact.manifest import read
from support import small_artifacts
from support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the example makes its keys with openssl")
def test_example_publishes_and_pulls_with_a_signature(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    root = small_artifacts.make_validated(tmp_path / "artifact", tmp_path / "work").root
    example = runpy.run_path(str(ROOT / "examples/publish_and_pull.py"))
    pulled = example["main"](root, tmp_path / "machines")
    assert read(pulled).manifest.version == read(root).manifest.version
    assert not (tmp_path / "machines/rejected").exists()
    published, _, rejected = capsys.readouterr().out.splitlines()
    assert published.startswith("published small@")
    assert rejected.startswith("rejected: not signed by ")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_uses_public_names_only(path):
    text = path.read_text()
    assert "pipeline." not in text
    assert text.partition("\n")[0].endswith("`.")
