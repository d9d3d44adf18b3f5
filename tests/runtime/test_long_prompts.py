"""Prompts that are longer than every prefill bucket: the same answers, drafts included, as with a bucket for each."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.graphs.arguments import Choice
from pipeline.recipe.schema import Recipe
from pipeline.runtime.batch import Batch, Row
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


def engine_of(work, method: str, prefill: tuple[int, ...], batch: tuple[int, ...] = (4,), device: str = "cpu"):
    recipe = Recipe.model_validate(
        {
            "name": "long",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": DRAFTS.get(method, {"source": "draft"}),
            "speculation": {"method": method, "draft_tokens": (2,), "sampling": ("greedy", "stochastic"), "lookup": 2},
            "shapes": {"batch": batch, "prefill": prefill, "kv": (48, KV)},
            "backend": {"name": "inductor", "device": device},
        }
    )
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def prompts_of(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("how", [{}, {"speculate": False}, SAMPLED], ids=["speculation", "decode", "sampled"])
@pytest.mark.parametrize("method", DRAFTS)
def test_every_length_gives_the_tokens_and_the_drafts_of_one_bucket(tmp_path, method, how):
    """Of every split into chunks: bucket edges, a token more or less; up to the end of the caches."""
    prompts = prompts_of([14, *range(23, 36), 47, 48, 49, 50, *range(88, KV)])
    chunked, whole = (engine_of(tmp_path, method, prefill) for prefill in ((8, 24), (KV - 1,)))
    answers, expected = (engine.generate(prompts, max_new_tokens=9, **how) for engine in (chunked, whole))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.emitted_per_step for answer in answers] == [answer.emitted_per_step for answer in expected]
    assert chunked.stats()["chunks"] > whole.stats()["chunks"] == 0


@pytest.mark.parametrize("method", [*DRAFTS, "p_eagle", "dflash", "dspark"])
def test_a_prompt_may_be_read_in_any_chunks(tmp_path, method):
    """Rows side by side that are cut at other places at each turn, of which the last chunk is one token or all."""
    if method not in DRAFTS:
        write_parallel(tmp_path / "draft", method)
    prompts = prompts_of([61, 50, 9, 33])
    engine, whole = (engine_of(tmp_path, method, (8, 24), (1, 4)), engine_of(tmp_path, method, (KV - 1,)))
    first = whole.batch.prefill(rows_of(prompts))
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        rows = rows_of(prompts)
        found: dict[int, int] = {}
        while waiting := {slot: row for slot, row in rows.items() if row.read < row.prompt}:
            sizes = torch.randint(1, 40, (len(rows),), generator=generator).tolist()
            ends = {slot: min(row.read + sizes[slot], row.prompt) for slot, row in waiting.items()}
            found |= engine.batch.read_to(ends, waiting)
        assert found == first
        check_states(engine, whole, {slot: row.prompt for slot, row in rows.items()}, method)


def test_a_chunk_is_what_begins_after_the_start_of_a_prompt(tmp_path):
    """Read up to 1, 2 and 3 tokens: the chunks begin at 0, at 0 and at 1; their calls and they are counted."""
    engine = engine_of(tmp_path, "draft_model", (8, 24))
    (rows, counted) = (rows_of(prompts_of([9])), [])
    for end in (1, 2, 3, 9):
        engine.batch.read_to({0: end}, rows)
        counted.append((engine.batch.stats["prefills"], engine.batch.stats["chunks"]))
    assert counted == [(1, 0), (2, 0), (3, 1), (4, 2)]


@pytest.mark.parametrize("method", DRAFTS)
def test_backends_with_graphs_for_empty_rows_give_the_same_answers(tmp_path, method):
    """Where attention takes time for unseen keys, prompts begin in graphs without a cache; single rows go on."""
    prompts = prompts_of([3, 24, 25, 60, 8, 95])
    engine, whole = engine_of(tmp_path, method, (8, 24), (1, 4), "cuda"), engine_of(tmp_path, method, (KV - 1,))
    kinds = {(g.batch, g.tokens, g.continues) for g in engine.graphs if g.phase == "prefill"}
    assert kinds == {(b, t, False) for b in (1, 4) for t in (8, 24)} | {(1, 8, True), (1, 24, True)}
    answers, expected = (each.generate(prompts, max_new_tokens=9) for each in (engine, whole))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.emitted_per_step for answer in answers] == [answer.emitted_per_step for answer in expected]


@pytest.mark.parametrize("method", DRAFTS)
def test_running_rows_are_not_changed_by_a_long_prompt_beside_them(tmp_path, method):
    prompts = prompts_of([5, 90, 6, 60, 7, 33])
    engine = engine_of(tmp_path, method, (8, 24), batch=(1, 2))
    together = engine.generate(prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=12)
        assert (answer.tokens, answer.emitted_per_step) == (alone.tokens, alone.emitted_per_step)


def rows_of(prompts: list[list[int]]) -> dict[int, Row]:
    return {slot: Row(list(prompt), len(prompt), 0, Choice()) for slot, prompt in enumerate(prompts)}


def check_states(engine, whole, lengths: dict[int, int], method: str) -> None:
    """Random drafts are rarely accepted, so answers alone would not show a hole in their caches."""
    for name, state in whole.ranks.state().items():
        for slot, length in lengths.items():
            of_head = name.startswith("draft/") and method in ("eagle3", "p_eagle")  # its slot needs the next token
            known = (slot,) if state.dim() < 4 else (slot, slice(None), slice(length - of_head))
            ours = engine.ranks.state()[name][known]
            torch.testing.assert_close(
                ours, state[known], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_prompt_fits_if_one_new_token_does(tmp_path):
    engine = engine_of(tmp_path, "eagle3", (8, 24))
    (longest,) = engine.generate(prompts_of([KV - 1]), max_new_tokens=5)
    assert len(longest.tokens) == 1
    with pytest.raises(InputError, match=f"{KV} tokens; the artifact takes 1 to {KV - 1}"):
        engine.generate(prompts_of([KV]))


@pytest.mark.parametrize(("method", "models"), [("draft_model", {"draft"}), ("eagle3", set())])
def test_warming_runs_every_graph_that_a_prompt_needs(tmp_path, method, models):
    engine, asked = engine_of(tmp_path, method, (8, 24)), []
    run = engine.ranks.run
    engine.ranks.run = lambda spec, given: (asked.append(spec), run(spec, given))[1]
    warmed = Batch(engine.manifest, engine.ranks).warm()
    assert warmed == len(asked)
    assert {spec.model for spec in asked if spec.phase == "score"} == models
