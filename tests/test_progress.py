"""Stages and times as they are reported."""

from __future__ import annotations

import re

import pytest

from pipeline.progress import duration, stage, working


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (361, "6 min 1 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_stage_is_a_line_with_its_time_when_it_ends():
    said, seen = [], []
    with stage("  package: files", said.append, lambda *of: seen.append(of)):
        assert seen == [("package: files", 0, 1)]
        assert said == []
    assert re.fullmatch(r"  package: files \(0\.\d s\)", said[0])
    assert seen[-1] == ("package: files", 1, 1)


def test_stage_that_fails_ends_its_bar_and_claims_no_time():
    said, seen = [], []
    with pytest.raises(ValueError, match="x"), stage("package", said.append, lambda *of: seen.append(of)):
        raise ValueError("x")
    assert said == []
    assert seen[-1] == ("package", 1, 1)


def test_working_ends_its_bar():
    seen = []
    with working("install", lambda *of: seen.append(of)):
        pass
    assert seen == [("install", 0, 1), ("install", 1, 1)]
