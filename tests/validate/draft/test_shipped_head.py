"""The shipped head of the default pair under planted misreadings, with the command of the doctor (`make test-slow`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from support.paths import ROOT

pytestmark = pytest.mark.slow

HEAD = ROOT / "recipes/drafts/smollm2-135m-eagle3"
TAPPED = "eagle_aux_hidden_state_layer_ids"


def report_of(tmp_path: Path, **changes: object) -> dict[str, object]:
    """The report on a copy of the head with other fields."""
    shutil.copytree(HEAD, tmp_path / "head")
    config = json.loads((HEAD / "config.json").read_text()) | changes
    (tmp_path / "head/config.json").write_text(json.dumps(config))
    recipe = (ROOT / "recipes/smollm2-135m-spec.yaml").read_text()
    recipe = recipe.replace("./drafts/smollm2-135m-eagle3", "./head")
    (tmp_path / "pair.yaml").write_text(recipe)
    run = CliRunner().invoke(main, ["draft", "doctor", str(tmp_path / "pair.yaml"), "--json"])
    report: dict[str, object] = json.loads(run.stdout)
    assert run.exit_code == (report["verdict"] != "agrees"), run.output
    return report


def test_the_head_as_it_is_shipped_agrees(tmp_path):
    report = report_of(tmp_path)
    assert report["verdict"] == "agrees", report["line"]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({TAPPED: [3, 16, 28]}, "taps: [2, 15, 27]"),
        ({TAPPED: [1, 14, 26]}, "taps: outputs"),
        ({"norm_before_residual": True}, "norm_before_residual: false"),
        ({"norm_output": True}, "norm_output: false"),
    ],
)
def test_a_planted_misreading_is_found(tmp_path, changes, setting):
    report = report_of(tmp_path, **changes)
    assert report["verdict"] == "another reading", report["line"]
    assert report["setting"] == setting
