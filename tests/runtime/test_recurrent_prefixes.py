"""Prefixes of a model with recurrent layers: only what a slot holds as a whole is shared, and tokens never change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.sources.pair import resolve_pair
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


def tokens_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def calls(engine: Engine, **how: object) -> list[list[int]]:
    """A chat that grows, another in its turns, prompts with one beginning that run together, and parts of the chat."""
    system, found = tokens_of(24, 0), []

    def ask(*prompts: list[int]) -> list[list[int]]:
        answers = engine.generate(list(prompts), max_new_tokens=6, **how)
        found.extend(part for answer in answers for part in (answer.tokens, answer.emitted_per_step))
        return [answer.tokens for answer in answers]

    chat, other = [*system, 5], [*system[:20], 9, 9]
    for turn in range(3):
        chat += ask(chat)[0] + tokens_of(4 + turn, turn)
        other += ask(other)[0] + tokens_of(3, 10 + turn)
    ask(*[[*system, *tokens_of(2 + 3 * number, 20 + number)] for number in range(5)])
    ask(chat, chat, other, system, system[:17], chat[:30])
    return found


@pytest.mark.parametrize("how", [{}, {"draft_tokens": 4}])
@pytest.mark.parametrize("family", ["qwen3.5", pytest.param("qwen3.5-moe", marks=pytest.mark.slow)])
def test_answers_and_drafts_are_those_without_sharing(engine_of: EngineOf, family: str, how: dict[str, object]) -> None:
    """Turns of a chat continue; of a draft with recurrent layers too. Parts of what a slot holds are read again."""
    shared, alone = engine_of(family, share=True), engine_of(family, share=False)
    assert calls(shared, **how) == calls(alone, **how)
    assert shared.stats()["shared_tokens"] > 50
    assert alone.stats()["shared_tokens"] == 0


def test_decode_steps_without_the_draft_share_nothing(engine_of: EngineOf) -> None:
    """The draft's caches are behind: there is no state of the target at their end."""
    shared, alone = engine_of("qwen3.5", share=True), engine_of("qwen3.5", share=False)
    assert calls(shared, speculate=False) == calls(alone, speculate=False)
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
