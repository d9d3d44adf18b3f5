"""The choice of K: by what was accepted, worth its cost, and never much worse than plain decode."""

import json
import random

import pytest

from pipeline.errors import CorruptError, TandemError
from pipeline.recipe.schema import Recipe
from pipeline.runtime.draft_length import Acceptance, DraftLengthPolicies, DraftLengthPolicy
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

COSTS = {2: 1.25, 4: 1.6}


def simulate(rate: float, steps: int = 4000, seed: int = 0) -> float:
    """Tokens per plain step's time when drafts are accepted at `rate`."""
    chance, row, draft_length_policy = random.Random(seed), Acceptance(), DraftLengthPolicy(COSTS)
    tokens = cost = 0.0
    for _ in range(steps):
        k = draft_length_policy.choose([row])
        accepted = 0
        while accepted < k and chance.random() < rate:
            accepted += 1
        if k:
            row.record_step(accepted, k)
        tokens += 1 + accepted
        cost += COSTS.get(k, 1.0)
    return tokens / cost


def test_a_short_answer_of_bad_drafts_loses_little():
    """120 tokens of text where nothing is accepted."""
    assert min(simulate(0.0, 120, seed) for seed in range(5)) > 0.95


def ideal(rate: float) -> float:
    return max(1.0, *(sum(rate**i for i in range(k + 1)) / cost for k, cost in COSTS.items()))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_pace_is_near_the_best_fixed_choice_and_never_below_plain(rate):
    got = simulate(rate)
    assert got > 0.95
    assert got > 0.93 * ideal(rate)


def test_pace_comes_back_when_text_gets_easier():
    row, draft_length_policy = Acceptance(), DraftLengthPolicy(COSTS)
    chosen = []
    for turn in range(400):
        k = draft_length_policy.choose([row])
        chosen.append(k)
        if k:
            row.record_step(0 if turn < 150 else k, k)
    assert set(chosen[60:150]) == {0, 2}
    assert chosen[60:150].count(0) > 75
    assert chosen[200:] == [4] * 200


def test_many_rows_share_one_choice():
    easy, hard = Acceptance(0.95), Acceptance(0.0)
    assert DraftLengthPolicy(COSTS).choose([easy, easy, easy, hard]) == 4
    assert DraftLengthPolicy(COSTS).choose([hard, hard, hard, hard]) == 0


def test_each_batch_bucket_and_length_of_caches_has_its_own_costs():
    cheap, dear = DraftLengthPolicy({4: 1.2}), DraftLengthPolicy({4: 3.0})
    policies = DraftLengthPolicies({1: {64: cheap, 128: dear}, 8: {128: dear}})
    assert policies.choose({0: Acceptance(0.6)}, 64) == 4
    assert policies.choose({0: Acceptance(0.6)}, 65) == 0
    assert policies.choose({0: Acceptance(0.6), 1: Acceptance(0.6)}, 64) == 0
    assert policies.choose({3: Acceptance(0.6)}, 10) == 0


CONTENT = {
    "name": "paced",
    "target": {"source": "pico://llama", "dtype": "float32"},
    "draft": {"source": "pico://llama?draft_vocab=128&eagle3=1"},
    "speculation": {
        "method": "eagle3", "draft_tokens": (2, 4), "step_costs": (1.25, 1.6), "sampling": ("greedy", "stochastic"),
    },
    "shapes": {"batch": (1,), "prefill": (32,), "kv": (128,)},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    work = tmp_path_factory.mktemp("pace")
    recipe = Recipe.model_validate(CONTENT)
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def test_engine_pauses_a_head_that_guesses_badly_and_changes_no_token(engine):
    plain = engine.generate([[5, 6, 7]], max_new_tokens=90, speculate=False)[0]
    before = engine.stats()
    paced = engine.generate([[5, 6, 7]], max_new_tokens=90)[0]
    after = engine.stats()
    assert paced.tokens == plain.tokens
    decoded = after["decode_steps"] - before["decode_steps"]
    speculated = after["speculative_steps"] - before["speculative_steps"]
    assert decoded > 3 * speculated > 0
    assert after["catch_ups"] == 0
    again = engine.generate([[5, 6, 7]], max_new_tokens=90)[0]
    assert again.emitted_per_step == paced.emitted_per_step


def test_costs_of_long_caches_hold_from_there_on(tmp_path):
    """Here drafts are free up to 64 tokens, and never worth their cost after these."""
    costs = {1: {64: (0.01, 0.01), 128: (9.0, 9.0)}}
    speculation = {**CONTENT["speculation"], "step_costs": costs}
    recipe = Recipe.model_validate({**CONTENT, "speculation": speculation})
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    answer = engine.generate([[5, 6, 7]], max_new_tokens=100)[0]
    stats = engine.stats()
    assert answer.tokens == engine.generate([[5, 6, 7]], max_new_tokens=100, speculate=False)[0].tokens
    drafted = 1 + sum(answer.emitted_per_step)  # the first token is the prompt's
    assert 64 <= 3 + drafted <= 64 + 5
    assert stats["decode_steps"] == 100 - drafted


@pytest.mark.parametrize(
    ("costs", "what"),
    [
        ((1.2,), r"expected one cost for each of \[2, 4\]"),
        ({2: (1.2, 1.5)}, r"expected costs for the batches \[1\], of caches of up to 128 tokens"),
        ({1: {64: (1.2, 1.5)}}, r"expected costs for the batches \[1\], of caches of up to 128 tokens"),
    ],
)
def test_costs_in_a_manifest_that_do_not_fit_its_graphs_are_refused_before_any_step(engine, costs, what, monkeypatch):
    """Was: a traceback at the step that needed them."""
    manifest = engine.batch.manifest.model_copy(update={"step_costs": costs})
    monkeypatch.setattr(engine.batch, "manifest", manifest)
    with pytest.raises(CorruptError, match=what):
        engine.generate([[5, 6, 7]], max_new_tokens=4)


def test_a_given_k_has_no_pace(engine):
    before = engine.stats()["decode_steps"]
    engine.generate([[5, 6, 7]], max_new_tokens=40, draft_tokens=4)
    assert engine.stats()["decode_steps"] == before


def test_sampled_answers_are_the_same_at_any_pace(engine):
    sampled = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    paced = engine.generate([[5, 6, 7]], **sampled)[0]
    assert paced.tokens == engine.generate([[5, 6, 7]], draft_tokens=4, **sampled)[0].tokens
    assert paced.tokens == engine.generate([[5, 6, 7]], speculate=False, **sampled)[0].tokens


@pytest.mark.parametrize("change", [{"step_costs": (1.2,)}, {"step_costs": (0.0, 1.2)}, {"method": "draft_model"}])
def test_costs_that_do_not_fit_are_refused(change):
    with pytest.raises((ValueError, TandemError)):
        Recipe.model_validate(json.loads(json.dumps(CONTENT)) | {"speculation": CONTENT["speculation"] | change})
