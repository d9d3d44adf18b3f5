"""Prompts that are longer than every prefill bucket: the same answers, drafts included, as with a bucket for each."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.recipe.schema import Recipe
from pipeline.runtime.batch import Batch
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.parallel_drafts import write_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

KV = 96
DRAFTS = {
    "draft_model": {"derive": {"from": "target", "layers": [0]}},
    "eagle3": {"source": "pico://llama?eagle3=1&draft_vocab=128"},
}
SAMPLED = {"temperature": 1.1, "top_k": 20, "seed": 5}


def engine_of(work, method: str, prefill: tuple[int, ...], batch: tuple[int, ...] = (4,)):
    recipe = Recipe.model_validate(
        {
            "name": "long",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": DRAFTS.get(method, {"source": "draft"}),
            "speculation": {"method": method, "draft_tokens": (2,), "sampling": ("greedy", "stochastic"), "lookup": 2},
            "shapes": {"batch": batch, "prefill": prefill, "kv": (48, KV)},
        }
    )
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def prompts_of(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("how", [{}, {"speculate": False}, SAMPLED], ids=["speculation", "decode", "sampled"])
@pytest.mark.parametrize("method", DRAFTS)
def test_every_length_gives_the_tokens_and_the_drafts_of_one_bucket(tmp_path, method, how):
    """Of every split into parts: bucket edges, whole chunks, a token more or less; up to the end of the caches."""
    prompts = prompts_of([14, *range(23, 36), 47, 48, 49, 50, *range(88, KV)])
    chunked, whole = (engine_of(tmp_path, method, prefill) for prefill in ((8, 24), (KV - 1,)))
    answers, expected = (engine.generate(prompts, max_new_tokens=9, **how) for engine in (chunked, whole))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.emitted_per_step for answer in answers] == [answer.emitted_per_step for answer in expected]
    assert chunked.stats()["chunks"] > whole.stats()["chunks"] == 0


@pytest.mark.parametrize("method", DRAFTS)
def test_running_rows_are_not_changed_by_a_long_prompt_beside_them(tmp_path, method):
    prompts = prompts_of([5, 90, 6, 60, 7, 33])
    engine = engine_of(tmp_path, method, (8, 24), batch=(1, 2))
    together = engine.generate(prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=12)
        assert (answer.tokens, answer.emitted_per_step) == (alone.tokens, alone.emitted_per_step)


@pytest.mark.parametrize("method", ["p_eagle", "dflash"])
def test_parts_leave_the_draft_the_state_of_one_bucket(tmp_path, method):
    """Random drafts are rarely accepted, so answers alone would not show a hole in their caches."""
    write_parallel(tmp_path / "draft", method)
    states = []
    for prefill in ((8, 24), (KV - 1,)):
        engine = engine_of(tmp_path, method, prefill, batch=(1,))
        engine.generate(prompts_of([61]), max_new_tokens=1)
        states.append(engine.ranks.state())
    for name in (name for name in states[0] if name.startswith("draft/")):
        known = 61 if method == "dflash" else 60  # a head's slot needs the next token
        ours, whole = (state[name] if name == "draft/feature" else state[name][:, :, :known] for state in states)
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_prompt_fits_if_one_new_token_does(tmp_path):
    engine = engine_of(tmp_path, "eagle3", (8, 24))
    (longest,) = engine.generate(prompts_of([KV - 1]), max_new_tokens=5)
    assert len(longest.tokens) == 1
    with pytest.raises(InputError, match=f"{KV} tokens; the artifact takes 1 to {KV - 1}"):
        engine.generate(prompts_of([KV]))


@pytest.mark.parametrize(("method", "models"), [("draft_model", {"target", "draft"}), ("eagle3", {"draft"})])
def test_warming_runs_every_graph_that_a_prompt_needs(tmp_path, method, models):
    engine, asked = engine_of(tmp_path, method, (8, 24)), []
    run = engine.ranks.run
    engine.ranks.run = lambda spec, given: (asked.append(spec), run(spec, given))[1]
    warmed = Batch(engine.manifest, engine.ranks).warm()
    assert warmed == len(asked)
    assert {spec.model for spec in asked if spec.phase == "score"} == models
