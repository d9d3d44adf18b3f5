"""Main measurements as text: a p-value has its verdict beside it."""

from __future__ import annotations

import pytest

from pipeline.validate.report.schema import Distribution, ExactTest, Gate, Report
from pipeline.validate.report.summaries import headlines
from support.paths import TESTS


@pytest.mark.parametrize(("passed", "verdict"), [(True, " (good: chance explains it)"), (False, "")])
def test_headlines_say_whether_the_smallest_p_is_good(passed, verdict):
    """`smallest p 0.03` did not say whether a small p is good."""
    report = Report.model_validate_json((TESTS / "fuzz/corpus/report/valid.json").read_text())
    test = ExactTest(graph="g", test="uniform", tokens=64, p_value=0.03)
    sampled = Distribution(
        false_alarm_rate=1e-4, settings=(), tokens=340, candidates=None, mass_left_out=None, tests=(test,)
    )
    gate = Gate(name="distribution", passed=passed, findings=() if passed else ("p=1e-9",))
    shown = dict(headlines(report.model_copy(update={"distribution": sampled, "gates": (*report.gates, gate)})))
    value = shown["sampled tokens recomputed from their seeds"]
    assert value == f"340 compared; 1 exact test, smallest p 0.03{verdict}"
