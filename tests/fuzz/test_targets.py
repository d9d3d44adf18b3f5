"""Every parser of outside input raises documented errors only: on the corpus, and on mutations of it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutations import mutated
from fuzz.targets import TARGETS, Parse, fault, scratch

CASES = 12
"""Mutations of each target in the fast lane; `make fuzz` runs many more."""
MOST_S = 1.0
NAMES = sorted(TARGETS)
SEEDS = {name: [path.read_bytes() for path in target.seeds()] for name, target in TARGETS.items()}


@pytest.fixture(scope="module")
def parsers() -> Iterator[dict[str, Parse]]:
    """The functions that were made so far, by target."""
    with ExitStack() as stack:
        made: dict[str, Parse] = {}

        class Parsers(dict[str, Parse]):
            def __missing__(self, name: str) -> Parse:
                self[name] = TARGETS[name].prepare(Path(stack.enter_context(scratch())))
                return self[name]

        yield Parsers(made)


@pytest.mark.parametrize("name", NAMES)
def test_corpus_raises_only_documented_errors(parsers, name):
    """Valid inputs are accepted: a corpus that a change of a format left behind would test nothing."""
    paths = TARGETS[name].seeds()
    assert any(path.name.startswith("valid") for path in paths)
    for path in paths:
        if path.name.startswith("valid"):
            parsers[name](path.read_bytes())
        assert fault(parsers[name], path.read_bytes()) is None, path


@pytest.mark.parametrize("name", NAMES)
def test_mutations_raise_only_documented_errors(parsers, name):
    parse, form = parsers[name], TARGETS[name].form

    @settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(SEEDS[name]), st.randoms(use_true_random=True))
    def check(seed: bytes, chance: random.Random) -> None:
        data = mutated(seed, form, chance)
        started = time.thread_time()
        error = fault(parse, data)
        assert time.thread_time() - started < MOST_S
        if error is not None:
            raise error

    check()


@pytest.mark.parametrize("name", NAMES)
def test_arbitrary_bytes_raise_only_documented_errors(parsers, name):
    parse = parsers[name]

    @settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.binary(max_size=64))
    def check(data: bytes) -> None:
        error = fault(parse, data)
        if error is not None:
            raise error

    check()


def test_fault_sees_an_undocumented_error():
    def parse(data: bytes) -> None:
        raise KeyError(data)

    assert isinstance(fault(parse, b""), KeyError)


def test_corpus_is_small():
    files = [path for target in TARGETS.values() for path in target.seeds()]
    assert sum(path.stat().st_size for path in files) < 2 << 20
