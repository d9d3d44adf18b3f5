"""Acceptance by place in a step, beside teacher forcing."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.recipe.schema import Recipe
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
    found = places_of([sequence(tokens, 2)], [steps], {"p": golden(best)}, None, 2, 99)
    assert found == [StepPlace(2, 1, 2), StepPlace(1, 1, 0)]
    ids = torch.arange(200) + 1
    assert places_of([sequence(tokens, 2)], [steps], {"p": golden(best)}, ids, 2, 99)[0].forced == 0


def test_a_draft_without_room_in_the_cache_is_not_counted():
    """A right pair failed: drafts at the end of the caches were right, and could not be accepted."""
    tokens, right = [5, 6, 10, 11, 12, 13], [6, 10, 11, 12, 13, 0]
    given = [sequence(tokens, 2)], [answer([1, 1, 1], [False] * 3)], {"p": golden(right)}, None, 2
    assert places_of(*given, 99)[0] == StepPlace(3, 0, 3)
    assert places_of(*given, 5)[0] == StepPlace(2, 0, 2)  # the last token is at position 4: no room for a draft
    assert places_of(*given, 4)[0] == StepPlace(1, 0, 1)


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


def outcome(limits, *, is_head=True, alone=1.0, cost=None, emitted=(2, 1, 2, 1)):
    measured = acceptance_of([Prompt("p", "chat", "")], [answer(list(emitted), [False] * 4)], 1)
    recipe = recipe_of(is_head, limits)
    return acceptance(
        [measured], None, recipe.validate_.gates, Expected([], alone, is_head, cost, recipe.floor)
    ).findings


def recipe_of(is_head, limits):
    return Recipe.model_validate(
        {
            "name": "places",
            "target": {"source": "target"},
            "draft": {"source": "draft"},
            "speculation": {"method": "eagle3" if is_head else "draft_model", "draft_tokens": (1,)},
            "shapes": {"batch": (1,), "prefill": (16,), "kv": (64,)},
            "validate": {"gates": limits},
        }
    )


def test_a_head_that_lookup_alone_would_beat_fails():
    assert outcome({"tokens_per_step": 1.2}) == ()
    assert "prompt lookup alone gives 1.60" in outcome({"tokens_per_step": 1.2}, alone=1.6)[0]
    assert outcome({"tokens_per_step": 1.2}, alone=1.6, is_head=False) == ()
    assert outcome({"tokens_per_step": 1.0}, alone=1.6) == ()
    assert "prompt lookup alone gives 1.60" in outcome({}, alone=1.6)[0]


@pytest.mark.parametrize(("is_head", "fails"), [(True, True), (False, False)])
def test_the_default_floor_is_of_heads(is_head, fails):
    """It was 1, which a head passes that proposes garbage."""
    found = outcome({}, is_head=is_head, emitted=[1, 1, 1, 2])
    assert found == (("K=1: 1.25 tokens per step is below the floor 1.3",) if fails else ())


def test_a_head_whose_steps_cost_more_than_they_emit_fails():
    assert outcome({}, cost=1.4) == ()
    assert outcome({}, cost=1.6) == ("K=1: 1.50 tokens per step; a step costs 1.60 decode steps",)


def test_a_stated_acceptance_is_compared():
    assert outcome({"acceptance": [0.55]}) == ()
    assert "0.50 of the drafts accepted, the recipe states 0.7" in outcome({"acceptance": [0.7]})[0]
