"""Lookup in earlier answers: what is found, by whom, in how much memory, and that it changes no token."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.recipe.schema import Recipe
from pipeline.runtime.answers import LONGEST, EarlierAnswers
from pipeline.runtime.engine import Engine
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine

SIZE = 3


def engine_with(lookup: int | None, work: Path) -> Engine:
    recipe = Recipe.model_validate(
        {
            "name": "answers",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": {"derive": {"from": "target", "layers": [0]}},
            "speculation": {"draft_tokens": (4,), "sampling": ("greedy", "stochastic"), "lookup": lookup},
            "shapes": {"batch": (1, 2), "prefill": (8,), "kv": (64,)},
        }
    )
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def brute_force(answers: list[list[int]], tokens: list[int], most: int) -> list[tuple[int, list[int]]]:
    """Every match of at least `SIZE` of the last tokens, and what followed: the longest first, the newest of these."""
    found = []
    for age, answer in enumerate(reversed(answers)):
        for end in range(len(answer) - 1, SIZE - 1, -1):
            length = 0
            while length < min(end, len(tokens), LONGEST) and answer[end - 1 - length] == tokens[-1 - length]:
                length += 1
            if length >= SIZE:
                found.append((-length, age, -end, answer[end : end + most]))
    return [(-length, following) for length, _, _, following in sorted(found)]


@pytest.mark.parametrize("seed", range(20))
def test_longest_match_then_newest(seed):
    chance = random.Random(seed)
    answers, kept = [], EarlierAnswers(100_000, SIZE)
    for _ in range(6):
        answer = [chance.randrange(4) for _ in range(chance.randrange(2, 30))]
        kept.add("", answer)
        answers.append(answer)
    for _ in range(30):
        tokens = [chance.randrange(4) for _ in range(chance.randrange(SIZE, 12))]
        wanted = brute_force(answers, tokens, 4)
        if len({following[0] for _, following in wanted}) <= 16:
            assert kept.find("", tokens, 4) == (wanted[0] if wanted else (0, []))


def test_tenants_do_not_see_each_other():
    kept = EarlierAnswers(1000, SIZE)
    kept.add("a", [1, 2, 3, 4, 5])
    assert kept.find("a", [1, 2, 3], 2) == (3, [4, 5])
    assert kept.find("b", [1, 2, 3], 2) == kept.find("", [1, 2, 3], 2) == (0, [])


def test_an_answer_does_not_run_into_the_next():
    kept = EarlierAnswers(1000, SIZE)
    kept.add("", [1, 2, 3, 4])
    kept.add("", [5, 6, 7, 8])
    assert kept.find("", [1, 2, 3], 4) == (3, [4])
    assert kept.find("", [2, 3, 4], 4) == (0, [])


def test_memory_is_bounded_and_the_newest_stay():
    kept, chance = EarlierAnswers(2000, SIZE), random.Random(0)
    answers = [[chance.randrange(50_000) for _ in range(90)] for _ in range(300)]
    for number, answer in enumerate(answers):
        kept.add(f"tenant {number % 40}", answer)
        held = [each for part in (kept._new, kept._old) for each in part.values()]
        assert sum(len(each.tokens) - 1 for each in held) <= 2000 + len(held)
    assert kept.find("tenant 19", answers[-1][:5], 3) == (5, answers[-1][5:8])
    assert kept.find("tenant 0", answers[0][:5], 3) == (0, [])


def test_a_token_takes_about_150_bytes():
    kept, chance = EarlierAnswers(1_000_000, SIZE), random.Random(0)
    kept.add("", [chance.randrange(50_000) for _ in range(100_000)])
    (answers,) = kept._new.values()
    index = sys.getsizeof(answers.newest) + len(answers.newest) * (32 + 32)
    size = index + sys.getsizeof(answers.tokens) + sys.getsizeof(answers.older)
    assert 80 < size / 100_000 < 170


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.usefixtures("one_thread")
def test_tokens_are_the_same_and_steps_are_fewer(temperature, tmp_path):
    """The same request twice: with the first answer kept, the second takes fewer steps for the same tokens."""
    prompts = [[5, 9, 3, 7], [11, 2, 8]]

    def answered(remember_tokens: int) -> tuple[list[list[int]], int]:
        engine = engine_with(SIZE, tmp_path)
        engine.batch.remember_answers(remember_tokens)
        engine.generate(prompts, max_new_tokens=24, temperature=temperature)
        found = engine.generate(prompts, max_new_tokens=24, temperature=temperature)
        return [each.tokens for each in found], sum(each.steps for each in found)

    (plain, plain_steps), (kept, kept_steps) = answered(0), answered(10_000)
    assert kept == plain
    assert kept_steps < plain_steps


def test_artifact_without_lookup_is_refused(tmp_path):
    engine = engine_with(None, tmp_path)
    with pytest.raises(InputError, match="built without prompt lookup"):
        engine.batch.remember_answers(1000)
    engine.batch.remember_answers(0)
    with pytest.raises(InputError, match="found -1"):
        engine.batch.remember_answers(-1)
