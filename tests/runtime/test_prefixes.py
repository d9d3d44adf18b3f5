"""Prompts that begin as earlier ones: the same answers and drafts as without sharing, and fewer tokens read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.graphs.arguments import Choice
from pipeline.recipe.schema import Recipe
from pipeline.runtime.batch import Row
from pipeline.runtime.engine import Engine
from pipeline.runtime.prefixes import LEAST_SHARED, Prefixes
from pipeline.sources.pair import resolve_pair
from support.conversations import calls, tokens_of
from support.eager import make_engine
from support.parallel_drafts import write_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFTS = {
    "draft_model": {"derive": {"from": "target", "layers": [0]}},
    "eagle3": {"source": "pico://llama?eagle3=1&draft_vocab=128"},
    "p_eagle": {"source": "draft"},
    "dflash": {"source": "draft"},
    "dspark": {"source": "draft"},
}
SAMPLED = {"temperature": 1.1, "top_k": 20, "seed": 5}
MORE = [("draft_model", SAMPLED), ("eagle3", {}), ("p_eagle", {}), ("dflash", {}), ("dspark", {})]
KV = 128

EngineOf = Callable[..., Engine]


@pytest.fixture
def engine_of(tmp_path: Path) -> EngineOf:
    def make(method: str, *, share: bool, copies: bool = True) -> Engine:
        if method in ("p_eagle", "dflash", "dspark") and not (tmp_path / "draft").exists():
            write_parallel(tmp_path / "draft", method)
        recipe = Recipe.model_validate(
            {
                "name": "shared",
                "target": {"source": "pico://llama", "dtype": "float32"},
                "draft": DRAFTS[method],
                "speculation": {"method": method, "draft_tokens": (2,), "sampling": ("greedy", "stochastic")},
                "shapes": {"batch": (1, 4), "prefill": (8, 32), "kv": (KV,)},
            }
        )
        pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
        engine = make_engine(recipe, pair, share_prefixes=share)
        if not copies:
            engine.ranks.copy_row = None
        return engine

    return make


@pytest.mark.parametrize("copies", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "how"),
    [("draft_model", {}), ("draft_model", {"speculate": False}), ("eagle3", SAMPLED),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)  # fmt: skip
def test_answers_and_drafts_are_those_without_sharing(
    engine_of: EngineOf, method: str, how: dict, copies: bool
) -> None:
    shared, alone = engine_of(method, share=True, copies=copies), engine_of(method, share=False)
    assert calls(shared, how) == calls(alone, how)
    assert shared.stats()["shared_tokens"] > (400 if copies else 100)
    assert alone.stats()["shared_tokens"] == 0
    assert shared.stats()["prefills"] < alone.stats()["prefills"]


@pytest.mark.parametrize("method", DRAFTS)
def test_caches_after_sharing_are_those_of_one_prompt(engine_of: EngineOf, method: str) -> None:
    """Random drafts are rarely accepted, so answers alone would not show a hole in their caches."""
    shared, alone = engine_of(method, share=True), engine_of(method, share=False)
    prompt = tokens_of(70, 0)
    for begin in (prompt[:40], [*prompt[:50], 3, 4, 5]):
        shared.generate([begin], max_new_tokens=4, speculate=method != "draft_model")
    for engine in (shared, alone):
        engine.generate([prompt], max_new_tokens=1)
    assert shared.stats()["shared_tokens"] >= 80
    for name, state in alone.ranks.state().items():
        of_head = name.startswith("draft/") and method in ("eagle3", "p_eagle")  # its slot needs the next token
        known = (0, slice(None), slice(len(prompt) - of_head)) if state.dim() == 4 else (0,)
        found = shared.ranks.state()[name][known]
        torch.testing.assert_close(
            found, state[known], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def row(tokens: list[int]) -> Row:
    return Row(tokens, len(tokens), 0, Choice())


def run(prefixes: Prefixes, tokens: list[int], free: list[int], most: int | None = None) -> tuple[int, int]:
    """Slot and shared tokens of a request, which ends at once with a token more."""
    request = row(list(tokens))
    slot = prefixes.begin(request, free, {}, most)
    shared = request.read
    prefixes.batch.read_to({slot: request.prompt}, {slot: request})
    request.tokens.append(7)
    prefixes.end(slot, request)
    return slot, shared


def test_what_ended_is_kept_aside_and_the_longest_unused_is_given_up(engine_of: EngineOf) -> None:
    prefixes = Prefixes(engine_of("eagle3", share=False).batch)
    texts = [tokens_of(30, seed) for seed in range(6)]
    free = [0, 1, 2, 3]
    assert [run(prefixes, text, free) for text in texts[:4]] == [(0, 0)] * 4
    assert run(prefixes, texts[0], free) == (0, 30)
    assert run(prefixes, texts[4], free) == (0, 0)  # in the place of texts[1]
    assert run(prefixes, texts[1], free) == (0, 0)
    assert run(prefixes, texts[0], free) == (0, 30)
    assert run(prefixes, texts[0][: LEAST_SHARED - 1], free) == (0, 0)


def test_no_more_is_shared_than_a_caller_allows(engine_of: EngineOf) -> None:
    """vLLM limits it by its own blocks, which depend on the salt of a tenant."""
    prefixes = Prefixes(engine_of("eagle3", share=False).batch)
    text, free = tokens_of(50, 1), [0, 1, 2, 3]
    assert [run(prefixes, text, free, most) for most in (None, 0, 20, LEAST_SHARED - 1, None)] == [
        (0, 0), (0, 0), (0, 20), (0, 0), (0, 50)
    ]  # fmt: skip


def test_a_running_request_shares_what_it_has_read(engine_of: EngineOf) -> None:
    engine = engine_of("draft_model", share=False)
    prefixes, text = Prefixes(engine.batch), tokens_of(40, 1)
    first = row(list(text))
    slot = prefixes.begin(first, [0, 1], {})
    engine.batch.read_to({slot: 25}, {slot: first})
    second = row([*text[:35], 4])
    assert prefixes.begin(second, [1], {slot: first}) == 1
    assert second.read == 25
    engine.ranks.copy_row = None
    assert prefixes.shared(text, {slot: first}) == 0
