"""Drafts that are not likely enough are not verified: fewer of them, and never other tokens."""

from itertools import pairwise

import pytest
import torch

from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.schema import Recipe
from pipeline.runtime.draft_length import DraftLengthPolicies, NextStep
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.pairs import make_pair
from support.parallel_drafts import write_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]
STEPS, COUNT = 4, 14


def generated(agreement, threshold):
    """Answers to the prompts, and the accepted and the verified drafts of each step of a row."""
    pair = make_pair(agreement, rows=len(PROMPTS))
    rows = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, pair.prefill(PROMPTS), strict=True)]
    spec = GraphSpec("speculate", len(rows), STEPS + 1, pair.shape.length, STEPS, threshold=True)
    steps = []
    while active := [len(row) - len(prompt) < COUNT for row, prompt in zip(rows, PROMPTS, strict=True)]:
        if not any(active):
            return [row[len(prompt) :][:COUNT] for row, prompt in zip(rows, PROMPTS, strict=True)], steps
        tokens, counts, verified = pair.step(
            spec, last_token=[row[-1] for row in rows], position=[len(row) - 1 for row in rows],
            active=torch.tensor(active), threshold=torch.full((len(rows),), threshold),
        )  # fmt: skip
        assert [int(number) for number in verified[~torch.tensor(active)]] == [0] * active.count(False)
        for row, new, size, number in zip(rows, tokens.tolist(), counts.tolist(), verified.tolist(), strict=True):
            row.extend(new[:size])
            steps += [(size - 1, number)] if size else []
    raise AssertionError


@pytest.mark.parametrize("agreement", ["all", "some", "none"])
def test_any_threshold_gives_the_targets_tokens(agreement):
    """A higher threshold verifies fewer drafts for each step; one above every chance verifies none."""
    found = {threshold: generated(agreement, threshold) for threshold in (0.0, 0.01, 0.05, 0.2, 1.5)}
    wanted = [make_pair(agreement, rows=len(PROMPTS)).greedy(prompt, COUNT) for prompt in PROMPTS]
    for answers, steps in found.values():
        assert answers == wanted
        assert all(0 <= accepted <= verified <= STEPS for accepted, verified in steps)
    means = [sum(verified for _, verified in steps) / len(steps) for _, steps in found.values()]
    assert means[0] == STEPS
    assert means[-1] == 0
    assert all(first >= second for first, second in pairwise(means))
    assert any(0 < mean < STEPS for mean in means)


@pytest.mark.parametrize("sampling", ["greedy", "stochastic"])
@pytest.mark.parametrize("method", ["eagle3", "p_eagle", "dflash"])
def test_every_kind_of_draft_leaves_drafts_out(tmp_path, method, sampling, monkeypatch):
    """The tokens of plain decode, with thresholds that leave out some drafts of some rows, and K switched between."""
    engine = engine_of(tmp_path, method, sampling)
    turns = iter([(STEPS, 0.0002), (2, 0.0), (0, 0.0), (STEPS, 0.02), (STEPS, 2.0), (2, 0.01)] * 100)
    monkeypatch.setattr(DraftLengthPolicies, "choose", lambda *_: NextStep(*next(turns)))
    temperature = 0.0 if sampling == "greedy" else 0.9
    settings = {"max_new_tokens": 40, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": 3}
    verified: list[int] = []
    run = engine.ranks.run

    def counted(spec, arguments):
        out = run(spec, arguments)
        verified.extend(out["verified"].tolist() if spec.phase == "speculate" and spec.draft_tokens == STEPS else [])
        return out

    monkeypatch.setattr(engine.ranks, "run", counted)
    paced = [answer.tokens for answer in engine.generate(PROMPTS, **settings)]
    assert paced == [answer.tokens for answer in engine.generate(PROMPTS, speculate=False, **settings)]
    assert 0 in verified
    assert any(0 < number < STEPS for number in verified)


def engine_of(work, method, sampling):
    """An eager engine of a tiny pair with step costs."""
    source = "pico://llama?draft_vocab=128&eagle3=1"
    if method != "eagle3":
        write_parallel(work / "draft", method)
        source = "draft"
    speculation = {"method": method, "draft_tokens": [2, STEPS], "step_costs": [1.2, 1.4]}
    speculation["sampling"] = ["greedy", "stochastic"] if sampling == "stochastic" else ["greedy"]
    content = {
        "name": "likely", "target": {"source": "pico://llama", "dtype": "float32"},
        "draft": {"source": source}, "speculation": speculation,
        "shapes": {"batch": [2], "prefill": [16], "kv": [96]}, "backend": {"name": "inductor"},
    }  # fmt: skip
    recipe = Recipe.model_validate(content)
    pair = resolve_pair(recipe, base=work, cache=work / "sources")
    return make_engine(recipe, pair)
