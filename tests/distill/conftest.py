"""Folders and texts that tests of training share."""

import json

import pytest

from pipeline.distill.run import prepare
from support.tiny_distill import ASKED, HELD_OUT, asking


@pytest.fixture(scope="module")
def short_parts():
    """Two parts of text where a run of the usual size would have written one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.distill.job.PART", 128)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    base = tmp_path_factory.mktemp("distill")
    lines = [json.dumps({"id": f"p{i}", "class": "chat", "prompt": text}) for i, text in enumerate(HELD_OUT)]
    (base / "held-out.jsonl").write_text("\n".join(lines))
    return base


@pytest.fixture(scope="module")
def asked(work):
    """A request whose text is there: an answer to each of four prompts."""
    request = asking(work, "asked", ASKED, steps=2)
    prepare(request).write_data()
    return request
