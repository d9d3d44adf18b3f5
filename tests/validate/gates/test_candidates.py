"""The probability that graphs with candidates can never sample: measured by the gate, stated in the report."""

from __future__ import annotations

import pytest
import torch

from pipeline.validate.gates.judge import SETTINGS, Judge
from pipeline.validate.report.summaries import headlines
from pipeline.validate.run import make_report
from support.reports import SMALL, gates_of, recipe_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mass_left_out_is_that_of_the_other_tokens():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    probs = torch.softmax(logits.double(), 0)
    assert Judge(2, 0.0).left_out(logits) == pytest.approx(float(probs[:2].sum()))
    assert Judge(None, 0.0).left_out(logits) == pytest.approx(0.0)


@pytest.mark.parametrize("candidates", [64, None])
def test_the_report_states_the_mass(tmp_path, candidates):
    """`candidates: 256` left out 4% of the target's distribution without a word."""
    recipe = recipe_of("llama", 3, "float32", ("greedy", "stochastic"), (2,), SMALL)
    speculation = recipe.speculation.model_copy(update={"candidates": candidates})
    run = gates_of(tmp_path, recipe.model_copy(update={"speculation": speculation}))
    assert run.passed, run.findings
    report = make_report(run, {})
    said = dict(headlines(report)).get("probability that is never sampled")
    if candidates is None:
        assert report.distribution.mass_left_out is None
        assert said is None
    else:
        mean, largest = report.distribution.mass_left_out
        assert 0.01 < mean <= largest < 1
        assert said == f"at temperature 1, 64 candidates leave out {mean:.1%} on average, {largest:.1%} at most"
        assert SETTINGS[0].temperature == 1
