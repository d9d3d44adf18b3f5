"""The gates catch what a broken build does, and pass what is right: over families and dtypes, each test a seed.

Rates over many seeds: `benchmarks/fault_rates.py`.
"""

import pytest

from support import planted
from support.reports import SMALL, gates_of, recipe_of

SAMPLED = ("greedy", "stochastic")
UNLIKE = (2,)
"""Layers of a draft that often disagrees with its target: there is something to reject."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


def one_of(size: int, faults, first: int):
    """One of so many; the others are in the slow lane. Of a fault in both dtypes, one is here."""
    marks = [[pytest.mark.slow] if number % size != first else [] for number in range(len(faults))]
    return [pytest.param(fault, marks=mark, id=fault.__name__) for fault, mark in zip(faults, marks, strict=True)]


@pytest.mark.parametrize("fault", [*one_of(2, planted.NUMERIC, 0), *planted.FLOAT32_ONLY])
def test_fault_in_float32_is_caught(work, fault):
    assert not gates_of(work, recipe_of("llama", 1, "float32", shapes=SMALL), fault, 1).passed


@pytest.mark.parametrize("fault", one_of(2, planted.NUMERIC, 1))
def test_fault_in_bfloat16_is_caught(work, fault):
    assert not gates_of(work, recipe_of("llama", 1, "bfloat16", shapes=SMALL), fault, 1).passed


def test_fault_is_found_at_its_layer(work):
    run = gates_of(work, recipe_of("llama", 1, "bfloat16"), planted.swapped_key_heads, 1)
    assert any("keys of layer 1" in failure for failure in run.findings["parity"]), run.findings


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16"), ("qwen2", "float16")])
def test_clean_pair_passes(work, family, dtype):
    run = gates_of(work, recipe_of(family, 2, dtype))
    assert run.passed, run.findings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clean_sampling_passes(work, dtype):
    run = gates_of(work, recipe_of("llama", 3, dtype, SAMPLED, UNLIKE, SMALL))
    assert run.passed, run.findings


@pytest.mark.parametrize("fault", planted.ACCEPTANCE, ids=lambda f: f.__name__)
def test_wrong_acceptance_of_sampled_drafts_is_caught(work, fault):
    """The greedy rows of a stochastic graph see it, too."""
    run = gates_of(work, recipe_of("llama", 3, "float32", SAMPLED, UNLIKE, SMALL), fault, 3)
    assert run.findings["distribution"]
    assert not run.findings["parity"]


@pytest.mark.parametrize("fault", one_of(4, planted.SAMPLING, 0))
def test_wrong_sampling_is_caught_by_the_distribution_alone(work, fault):
    run = gates_of(work, recipe_of("llama", 3, "bfloat16", SAMPLED, UNLIKE, SMALL), fault, 3)
    assert run.findings["distribution"]
    assert not run.findings["parity"]
    assert not run.findings["losslessness"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_later_proposals_are_caught_by_acceptance_alone(work, dtype):
    """The mean, the only limit before, was far above its floor."""
    run = gates_of(work, recipe_of("llama", 3, dtype, shapes=SMALL), planted.later_proposals_wrong, 3)
    assert "place 2 of a step" in run.findings["acceptance"][0]
    assert not run.findings["parity"]
    assert not run.findings["losslessness"]
