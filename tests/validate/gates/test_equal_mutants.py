"""What `benchmarks/mutants.py` calls equal is equal, as far as a small domain shows it."""

from __future__ import annotations

import pytest

from support.equal_mutants import DOMAINS, is_equal
from support.mutants import EXPLAINED, MODULES, Mutant, mutants

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def every() -> list[Mutant]:
    return [mutant for module in MODULES for mutant in mutants(module)]


def test_every_explanation_is_of_a_mutant(every):
    """Code that was rewritten takes its explanation along, or leaves it behind."""
    assert [text for text in EXPLAINED if not any(text in str(mutant) for mutant in every)] == []


@pytest.mark.parametrize("text", DOMAINS)
def test_mutants_that_are_called_equal_are(every, text):
    """Of `take`, the numbers of one line have one text: one of them is equal."""
    found = [mutant for mutant in every if text in str(mutant)]
    equal = [mutant for mutant in found if is_equal(mutant, DOMAINS[text])]
    assert len(equal) == (1 if text.startswith("take") else len(found)) > 0
    assert text in EXPLAINED


@pytest.mark.parametrize("text", DOMAINS)
def test_other_mutants_of_the_same_functions_are_not_equal(every, text):
    """A domain on which nothing differs shows nothing."""
    function = text.split(":")[0].split(".")[-1] if ": " in text else "readable"
    others = [mutant for mutant in every if mutant.function.endswith(function) and text not in str(mutant)]
    assert not all(is_equal(mutant, DOMAINS[text]) for mutant in others)
