"""Decisions of the Ray executor that need no cluster: which jobs start first, which are slow, what no node has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.executors.base import Task
from pipeline.executors.scheduling import SLOW_S, is_slow, longest_first, missing

NODES = [{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 16e9, "neuronx-cc": 1.0}]


def test_longest_first_keeps_the_order_of_equals():
    tasks = [Task(str(seconds), Path(), seconds) for seconds in (1.0, 5.0, 1.0, 9.0)]
    assert longest_first(tasks) == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"CPU": 4.0, "memory": 8e9}, ""),
        ({"CPU": 2.0, "neuronx-cc": 1.0}, ""),
        ({"CPU": 8.0}, "cores: 8"),
        ({"CPU": 1.0, "memory": 20e9}, "memory: 18.6 GiB"),
        ({"CPU": 4.0, "neuronx-cc": 1.0}, "neuronx-cc: 1"),
        ({"CPU": 1.0, "GPU": 1.0}, "GPUs: 1"),
    ],
)
def test_missing_names_what_the_nearest_node_lacks(needs, words):
    assert missing(needs, NODES) == words


def test_missing_of_no_nodes_is_everything():
    assert missing({"CPU": 1.0, "GPU": 0.0}, []) == "cores: 1"


@pytest.mark.parametrize(
    ("elapsed_s", "estimate_s", "slower", "slow"),
    [
        (10_000, 60, [], False),  # no job has ended: estimates may be wrong for this machine
        (SLOW_S - 1, 1, [1.0], False),
        (SLOW_S + 1, 1, [1.0], True),
        (1000, 200, [1.0, 1.2, 1.1], True),
        (1000, 200, [3.0, 2.0, 2.5], False),  # all jobs take that much longer here
    ],
)
def test_is_slow(elapsed_s, estimate_s, slower, slow):
    assert is_slow(elapsed_s, estimate_s, slower) is slow
