"""What `tandem bench` makes of arrival times."""

from __future__ import annotations

import pytest

from pipeline.measure.bench import _figures


def test_tokens_of_one_step_share_its_time():
    """First token after 1 s; a step of four tokens that took 0.4 s, one of one token that took 0.4 s."""
    found = _figures("it", [([1.0, 1.4, 1.4, 1.4, 1.4, 1.8], 2)])
    assert found.first_token_ms == 1000
    assert found.p50_ms == pytest.approx(100)
    assert found.tokens_per_step == 2.5
    assert found.tokens_per_s == pytest.approx(6 / 1.8)


def test_p99_is_the_slowest_but_one_in_a_hundred():
    arrivals = [0.01 * i for i in range(101)]
    assert _figures("even", [(arrivals, 100)]).p99_ms == pytest.approx(10)
    late = [*arrivals, arrivals[-1] + 1, arrivals[-1] + 2]
    assert _figures("late", [(late, 102)]).p99_ms == pytest.approx(1000)


def test_an_answer_of_one_token_has_no_latency_between_tokens():
    assert _figures("one", [([0.5], 0)]).p99_ms == 0
