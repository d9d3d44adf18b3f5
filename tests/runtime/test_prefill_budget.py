"""Tokens of prompts in a step beside running rows: at most the time of the step for each prompt that waits."""

import pytest

from pipeline.runtime.prefill_budget import PrefillBudget, measured_budget
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.reports import recipe_of

BUDGET = PrefillBudget(call=0.010, token=0.002, steps={1: 0.050, 4: 0.150, 8: 0.3}, buckets=(16, 64, 128))


@pytest.mark.parametrize(
    ("running", "waiting", "tokens"),
    [
        (1, 1, 15),  # 20 tokens take as long as a step; a bucket of 16 reads 15 new ones
        (1, 7, 170),  # more than the largest bucket
        (1, 3, 63),
        (2, 1, 63),  # 70
        (4, 1, 63),
        (5, 1, 145),
        (8, 2, 295),
    ],
)
def test_each_prompt_gets_the_time_of_a_step(running, waiting, tokens):
    assert BUDGET.tokens(running, waiting) == tokens
    step = BUDGET.steps[min(batch for batch in BUDGET.steps if batch >= running)]
    assert BUDGET.call + BUDGET.token * tokens <= waiting * step


def test_a_prompt_goes_on_where_every_part_takes_longer_than_a_step():
    assert PrefillBudget(1.0, 1.0, {1: 0.1}, (32, 64)).tokens(1, 1) == 31


@pytest.mark.parametrize("sampling", [("greedy",), ("stochastic",), ("greedy", "stochastic", "shaped")])
def test_an_open_artifact_is_measured(tmp_path, sampling):
    """Of an artifact without greedy graphs no step was found, and the server ended at its first request."""
    recipe = recipe_of("llama", 4, "float32", sampling)
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    ran, run = [], engine.ranks.run
    engine.ranks.run = lambda spec, given: (ran.append(spec), run(spec, given))[1]
    budget = measured_budget(engine.batch)
    assert {(spec.phase, spec.batch) for spec in ran} >= {("prefill", engine.batch.manifest.shapes.batch[0])}
    assert set(budget.steps) == set(engine.batch.manifest.shapes.batch)
    assert all(seconds > 0 for seconds in (budget.token, *budget.steps.values()))
    assert budget.buckets == engine.batch.manifest.shapes.prefill
