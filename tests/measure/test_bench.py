"""What `tandem bench` makes of arrival times."""

from __future__ import annotations

import pytest

from pipeline.measure.bench import figures_of, interleaved
from pipeline.runtime.latency import Arrival, TimedRequest


def request(*arrivals: tuple[float, int]) -> TimedRequest:
    return TimedRequest(tuple(Arrival(*arrival) for arrival in arrivals))


def test_tokens_of_one_step_share_its_time():
    """First token after 1 s; a step of four tokens that took 0.4 s, one of one token that took 0.4 s."""
    figures = figures_of("it", [request((1.0, 1), (1.4, 4), (1.8, 1))])
    assert figures.first_token_ms == 1000
    assert figures.p50_ms == pytest.approx(100)
    assert figures.tokens_per_step == 2.5
    assert figures.tokens_per_s == pytest.approx(5 / 0.8)


def test_p99_is_the_slowest_but_one_in_a_hundred():
    arrivals = [(0.01 * i, 1) for i in range(101)]
    assert figures_of("even", [request(*arrivals)]).p99_ms == pytest.approx(10)
    end = arrivals[-1][0]
    late = [*arrivals, (end + 1, 1), (end + 2, 1)]
    assert figures_of("late", [request(*late)]).p99_ms == pytest.approx(1000)


def test_an_answer_of_one_token_has_no_latency_between_tokens():
    assert figures_of("one", [request((0.5, 1))]).p99_ms == 0


def test_contenders_take_turns_and_their_first_answer_only_warms_up():
    asked: list[tuple[str, int]] = []

    def contender(name: str):
        def answer(tokens: list[int]) -> TimedRequest:
            asked.append((name, tokens[0]))
            return request((0.1, 1))

        return answer

    requests = interleaved({"a": contender("a"), "b": contender("b")}, [[1], [2]])
    assert asked == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(of) for name, of in requests.items()} == {"a": 2, "b": 2}
