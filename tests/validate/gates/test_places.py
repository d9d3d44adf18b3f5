"""Acceptance by place in a step, beside teacher forcing."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.recipe.schema import Gates
from pipeline.runtime.calls import Generation
from pipeline.validate.gates.acceptance import Expected, acceptance, acceptance_of
from pipeline.validate.gates.answers import ScoredSequence
from pipeline.validate.gates.places import StepPlace, findings_of, lookup_alone, places_of
from pipeline.validate.prompts import Prompt


def sequence(tokens, prompt):
    return ScoredSequence("p", "chat", tokens, prompt)


def golden(best, noise=None):
    chosen = [SimpleNamespace(best=torch.tensor(of)) for of in (best, noise or best)]
    return SimpleNamespace(baseline=chosen[0], noise=chosen[1])


def answer(emitted, copied):
    return Generation([], "", len(emitted), 0, "length", emitted, copied)


def test_places_follow_the_steps_of_an_answer():
    """Two prompt tokens, one from prefill, a step of 3 tokens, a copied step of 2, a step of 1."""
    tokens = [5, 6, 10, 11, 12, 13, 14, 15, 16]
    best = [0, 0, 11, 99, 13, 0, 0, 16, 0]  # right at 3, wrong at 4, right at 5 and 8
    steps = answer([3, 2, 1], [False, True, False])
    found = places_of([sequence(tokens, 2)], [steps], {"p": golden(best)}, None, 2)
    assert found == [StepPlace(2, 1, 2), StepPlace(1, 1, 0)]
    ids = torch.arange(200) + 1
    assert places_of([sequence(tokens, 2)], [steps], {"p": golden(best)}, ids, 2)[0].forced == 0


@pytest.mark.parametrize(
    ("place", "is_head", "fails"),
    [
        (StepPlace(100, 70, 70), False, False),
        (StepPlace(100, 60, 70), False, True),
        (StepPlace(100, 80, 70), False, True),
        (StepPlace(100, 60, 70, unsure=10), False, False),
        (StepPlace(100, 40, 70), True, False),
        (StepPlace(100, 3, 70), True, True),
        (StepPlace(100, 90, 70), True, False),
        (StepPlace(), True, False),
    ],
)
def test_a_place_must_accept_what_teacher_forcing_accepts(place, is_head, fails):
    found = findings_of([StepPlace(50, 25, 25), place], is_head=is_head, near_tie_rate=0.02)
    assert [text.startswith("place 2 of a step") for text in found] == [True] * fails


def test_the_first_place_of_a_head_reads_the_targets_features():
    assert findings_of([StepPlace(100, 40, 70)], is_head=True, near_tie_rate=0.02)


def test_lookup_alone_counts_its_steps():
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]
    assert lookup_alone([sequence(text, 8)], 3, 2) == 3.0
    assert lookup_alone([sequence(list(range(12)), 2)], None, 4) == 1.0


def outcome(limits, *, is_head=True, alone=1.0, cost=None):
    measured = acceptance_of([Prompt("p", "chat", "")], [answer([2, 1, 2, 1], [False] * 4)], 1)
    return acceptance([measured], None, Gates(**limits), Expected([], alone, is_head, cost)).findings


def test_a_head_that_lookup_alone_would_beat_fails():
    assert outcome({"tokens_per_step": 1.2}) == ()
    assert "prompt lookup alone gives 1.60" in outcome({"tokens_per_step": 1.2}, alone=1.6)[0]
    assert outcome({"tokens_per_step": 1.2}, alone=1.6, is_head=False) == ()
    assert outcome({}, alone=1.6) == ()


def test_a_head_whose_steps_cost_more_than_they_emit_fails():
    assert outcome({}, cost=1.4) == ()
    assert outcome({}, cost=1.6) == ("K=1: 1.50 tokens per step; a step costs 1.60 decode steps",)


def test_a_stated_acceptance_is_compared():
    assert outcome({"acceptance": [0.55]}) == ()
    assert "0.50 of the drafts accepted, the recipe states 0.7" in outcome({"acceptance": [0.7]})[0]
