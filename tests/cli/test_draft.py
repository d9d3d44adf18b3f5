"""draft: a recipe from a head, conversion of pickled weights, and what the doctor shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.draft import _show
from pipeline.cli.main import main
from pipeline.recipe import load
from pipeline.validate.draft.report import Coverage, DraftReport, Expected, Measured
from support.heads import SPECULATORS, Parts, write_head

REPORT = DraftReport(
    recipe="pair",
    read="EAGLE-3 head of modelopt: reads the inputs of layers 1, 17, 32; no optional norms",
    doubts=("eagle_config ids may be outputs or inputs of layers: draft.taps",),
    notes=("the head names the target org/a; the recipe has org/b",),
    prompts=24,
    chains=1152,
    chance=0.01,
    vocabulary=Coverage(tokens=32000, of=128256, answers=0.987),
    current=Measured(reading="as the file and the recipe say", by_place=(0.12, 0.1), tokens_per_step=1.13),
    others=(Measured(reading="taps: outputs", by_place=(0.61, 0.5), tokens_per_step=1.92, better=True),),
    expected=(Expected(draft_tokens=2, tokens_per_step=1.13, step_cost=1.2, speed_up=0.94),),
    setting="taps: outputs",
    verdict="another reading",
)


def test_show_has_readings_and_the_line_for_the_recipe(capsys):
    _show(REPORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [f"unclear: {REPORT.doubts[0]}", f"note: {REPORT.notes[0]}"]
    assert "vocabulary: 32,000 of 128,256 tokens, 98.7% of the answers' tokens" in lines
    assert "draft.taps: outputs (better)" in "\n".join(lines)
    assert lines[-3] == "K=2: 0.94x plain decode at a step cost of 1.2"
    assert lines[-2].endswith("12% of first drafts are right, 1.13 tokens per step; with taps: outputs, 61% and 1.92")
    assert lines[-1] == "fix: write in the recipe: draft: {taps: outputs}"


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        ("chance", "the draft agrees with this target by chance: 12% of first drafts are right"),
        ("below the stated rates", "the draft agrees less than half as often as the recipe states (0.70)"),
        ("agrees", "the draft agrees with this target: 12%"),
    ],
)
def test_each_verdict_is_one_line(verdict, line):
    report = REPORT.model_copy(update={"verdict": verdict, "setting": None, "stated": (0.7,)})
    assert report.line.startswith(line)
    assert "\n" not in report.line
    assert bool(report.fix) == (verdict != "agrees")


def test_a_target_that_says_one_token_everywhere_has_a_line_of_its_own():
    """It said that the draft agrees by chance, and the build of the pair passed its gates."""
    report = REPORT.model_copy(update={"verdict": "chance", "setting": None, "chance": 1.0})
    assert report.line.startswith("the target's answers are nearly one token, which any draft finds: 12% of first")
    assert report.fix == "look at the target's answers with `tandem run`; random weights give such ones"


def test_recipe_of_a_head_loads(tmp_path: Path):
    head = write_head(tmp_path / "head", SPECULATORS, Parts(layer="layers.0."))
    run = CliRunner().invoke(main, ["draft", "recipe", str(head)])
    assert run.exit_code == 0, run.output
    (tmp_path / "target-spec.yaml").write_text(run.stdout)
    assert load(tmp_path / "target-spec.yaml").target.source == "hf://org/target"


def test_commands_import_no_torch():
    code = "import sys, pipeline.cli.draft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
