"""A source that is a folder: where there is none, the fix names one that is near."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.sources.folder import located, other_folder


@pytest.mark.parametrize(
    ("location", "fix"),
    [
        ("./model/acme", "did you mean models/acme?"),
        ("./models/acne", "did you mean models/acme?"),
        ("./model/acne", "did you mean models/acme?"),
        ("./other/weights", "give a folder with config.json and *.safetensors"),
    ],
)
def test_located_of_a_missing_folder_names_a_near_one(tmp_path, monkeypatch, location, fix):
    """`./model/acme` was `for the Hub, write hf://model/acme`, though `./` is no address of the Hub."""
    monkeypatch.chdir(tmp_path)
    Path("models/acme").mkdir(parents=True)
    with pytest.raises(SourceError, match="no such folder") as caught:
        located(location, Path())
    assert caught.value.fix == fix


def test_other_folder_of_a_name_without_a_dot_may_be_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert other_folder(Path("Qwen/Qwen3-8B")).startswith("for the Hub, write hf://Qwen/Qwen3-8B@REVISION")
