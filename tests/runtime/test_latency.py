"""Latency: what arrival times mean, the same for the server, the benchmarks and the report."""

from __future__ import annotations

import pytest

from pipeline.runtime.latency import Arrival, ArrivalClock, DecodeTotals, TimedRequest, latency_of, quantile


def request(*arrivals: tuple[float, int]) -> TimedRequest:
    return TimedRequest(tuple(Arrival(*arrival) for arrival in arrivals))


def test_tokens_of_one_step_share_its_time():
    """First token after 1 s; a step of four tokens that took 0.4 s, one of one token that took 0.4 s."""
    latency = latency_of([request((1.0, 1), (1.4, 4), (1.8, 1))])
    assert latency.first_token_ms == 1000
    assert latency.step_ms == pytest.approx((400, 400))
    assert latency.token_p50_ms == pytest.approx(100)
    assert latency.token_p99_ms == pytest.approx(400)
    assert latency.inter_token_ms == pytest.approx(160)


def test_rates_leave_the_first_token_out():
    """Reading a prompt is not decoding: `tokens/s` of a long prompt and of a short one are the same."""
    for first in (0.1, 5.0):
        latency = latency_of([request((first, 1), (first + 0.4, 4), (first + 0.8, 1))])
        assert latency.tokens_per_s == pytest.approx(5 / 0.8)
        assert latency.tokens_per_step == 2.5


def test_rates_of_several_requests_weigh_every_token_the_same():
    latency = latency_of([request((1.0, 1), (2.0, 4)), request((2.0, 1), (2.5, 1))])
    assert latency.first_token_ms == 1500
    assert latency.tokens_per_s == pytest.approx(5 / 1.5)


@pytest.mark.parametrize(
    ("count", "share", "rank"), [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (100, 0.99, 99), (101, 0.99, 100)]
)
def test_quantile_is_the_nearest_rank(count, share, rank):
    assert quantile(list(range(1, count + 1)), share) == rank


def test_answer_of_one_token_has_no_latency_between_tokens():
    latency = latency_of([request((0.5, 1))])
    assert latency.first_token_ms == 500
    assert latency.step_ms == ()
    assert {latency.step_p50_ms, latency.token_p99_ms, latency.inter_token_ms} == {None}
    assert latency.tokens_per_s == 0


def test_totals_add_up():
    assert DecodeTotals(2, 0.5, 1) + DecodeTotals(4, 1.0, 2) == DecodeTotals(6, 1.5, 3)


def test_clock_takes_the_engines_callback():
    clock = ArrivalClock()
    clock.on_tokens(0, [7])
    clock.on_tokens(0, [8, 9])
    first, second = clock.request().arrivals
    assert (first.tokens, second.tokens) == (1, 2)
    assert 0 <= first.time_s <= second.time_s
