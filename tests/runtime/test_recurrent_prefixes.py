"""Prefixes of a model with recurrent layers: only what a slot holds as a whole is shared, and tokens never change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.sources.pair import resolve_pair
from support.conversations import calls, tokens_of
from support.eager import make_engine
from support.families import FAMILIES, write_pair

pytestmark = pytest.mark.usefixtures("one_thread")

EngineOf = Callable[..., Engine]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> EngineOf:
    def make(family: str, *, share: bool, copies: bool = True) -> Engine:
        root = tmp_path_factory.mktemp(family)
        recipe = Recipe.model_validate(
            {
                "name": "shared",
                "target": {"source": "./target", "dtype": "float32"},
                "draft": write_pair(FAMILIES[family], root),
                "speculation": {"draft_tokens": (2, 4)},
                "shapes": {"batch": (1, 3), "prefill": (8, 32), "kv": (128,)},
            }
        )
        pair = resolve_pair(recipe, base=root, cache=root / "sources")
        engine = make_engine(recipe, pair, share_prefixes=share)
        if not copies:
            engine.ranks.copy_row = None
        return engine

    return make


@pytest.mark.parametrize("how", [{}, {"draft_tokens": 4}])
@pytest.mark.parametrize("family", ["qwen3.5", pytest.param("qwen3.5-moe", marks=pytest.mark.slow)])
def test_answers_and_drafts_are_those_without_sharing(engine_of: EngineOf, family: str, how: dict[str, object]) -> None:
    """Turns of a chat continue; of a draft with recurrent layers too. Parts of what a slot holds are read again."""
    shared, alone = engine_of(family, share=True), engine_of(family, share=False)
    assert calls(shared, how) == calls(alone, how)
    assert shared.stats()["shared_tokens"] > 50
    assert alone.stats()["shared_tokens"] == 0


def test_decode_steps_without_the_draft_share_nothing(engine_of: EngineOf) -> None:
    """The draft's caches are behind: there is no state of the target at their end."""
    shared, alone = engine_of("qwen3.5", share=True), engine_of("qwen3.5", share=False)
    assert calls(shared, {"speculate": False}) == calls(alone, {"speculate": False})
    assert shared.stats()["shared_tokens"] == 0


@pytest.mark.parametrize("copies", [True, False])
def test_only_the_whole_of_what_a_slot_holds_is_shared(engine_of: EngineOf, copies: bool) -> None:
    engine = engine_of("qwen3.5", share=True, copies=copies)
    text = tokens_of(60, 1)

    def shared(prompt: list[int]) -> int:
        before = engine.stats()["shared_tokens"]
        answer = engine.generate([prompt], max_new_tokens=3)[0].tokens
        text[:] = [*prompt, *answer]
        return engine.stats()["shared_tokens"] - before

    assert shared(list(text)) == 0
    assert shared([*text, 7]) in (61, 62)
    assert shared(text[:50]) == 0
    assert shared([*text[:40], 7]) == 0
    assert shared([*text, 7, 8, 9]) in (42, 43)
