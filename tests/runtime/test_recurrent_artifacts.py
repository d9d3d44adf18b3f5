"""Compiled artifacts with recurrent layers: rejected drafts and rows that continue give the tokens of decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.graphs.arguments import PromptRow, prefill_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.runtime.open import load
from pipeline.validate.gates.driving import Row, step
from support import families
from support.builds import build, recipe_of
from support.conversations import calls, tokens_of

pytestmark = [pytest.mark.compile, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Talk = Callable[[Engine, dict[str, Any]], list[list[int]]]
"""Asks an engine; tokens and steps of its answers."""

STEPS, ANSWER = 4, 24
PROMPTS = ([5, 9, 3], tokens_of(17, 8))
"""One shorter than what a row can return by, and a longer one: both rows of a call are at different positions."""
KINDS = {
    "a draft with a recurrent layer": ("qwen3.5", {}),
    "a draft with experts and a recurrent layer": ("qwen3.5-moe", {}),
    "two ranks": ("qwen3.5", {"parallel": {"tensor": 2}}),
}


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a random pair in float32, whose greedy tokens rounding does not decide."""
    family, sections = KINDS[request.param]
    root = tmp_path_factory.mktemp("recurrent")
    draft = families.write_pair(families.FAMILIES[family], root)
    recipe = recipe_of(
        family, draft, target={"source": "./target", "dtype": "float32"},
        speculation={"draft_tokens": [STEPS], "sampling": ["greedy"], "lookup": 2},
        shapes={"batch": [len(PROMPTS)], "prefill": [32], "kv": [128]}, **sections,
    )  # fmt: skip
    _, report = build(recipe, root)
    assert report["passed"]
    return root / "out"


@pytest.fixture
def engine(artifact: Path) -> Iterator[Engine]:
    with load(artifact) as engine:
        yield engine


def graph_of(engine: Engine, phase: str) -> GraphSpec:
    return next(graph for graph in engine.graphs if graph.phase == phase)


def prefilled(engine: Engine) -> list[Row]:
    """Rows that have read their prompts in empty caches, each with its first new token."""
    engine.ranks.reset()
    spec = graph_of(engine, "prefill")
    prompts = [PromptRow(prompt, slot) for slot, prompt in enumerate(PROMPTS)]
    first = engine.ranks.run(spec, prefill_arguments(spec, prompts, engine.rows))["token"].tolist()
    return [Row([*prompt, token], len(prompt)) for prompt, token in zip(PROMPTS, first, strict=True)]


def advance(engine: Engine, phase: str, rows: Sequence[Row], copies: Sequence[list[int]] = ()) -> list[int]:
    """Run a step of all rows; return how many tokens each one gained."""
    gained = step(engine, graph_of(engine, phase), rows, [True] * len(rows), copies=copies)
    for row, new in zip(rows, gained, strict=True):
        row.tokens.extend(new)
    return [len(new) for new in gained]


def right_up_to(place: int, row: Row, wanted: Row) -> list[int]:
    """Drafts of which the first `place` are the tokens of decode steps, and none after them."""
    right = wanted.tokens[len(row.tokens) :][:STEPS]
    return [token if index < place else (token + 1) % 300 for index, token in enumerate(right)]


def test_a_rejection_at_every_place_changes_no_token(engine: Engine) -> None:
    """All pairs of accepted counts in a row, other ones in the row beside it, then decode steps."""
    wanted = prefilled(engine)
    for _ in range(ANSWER):
        advance(engine, "decode", wanted)
    for first, second in product(range(STEPS + 1), repeat=2):
        rows = prefilled(engine)
        for accepted in ((first, second), (second, STEPS - first), (STEPS, first)):
            copies = [right_up_to(*of) for of in zip(accepted, rows, wanted, strict=True)]
            assert advance(engine, "speculate", rows, copies) == [count + 1 for count in accepted]
        for _ in range(3):
            advance(engine, "decode", rows)
        for row, of in zip(rows, wanted, strict=True):
            assert row.tokens == of.tokens[: len(row.tokens)], (first, second)


def turns(engine: Engine, how: dict[str, Any]) -> list[list[int]]:
    """One chat that grows, and then one that begins as it did; tokens and steps of the answers."""
    chat, found = tokens_of(21, 3), []
    for turn in range(5):
        answer = engine.generate([chat], max_new_tokens=9 + turn, **how)[0]
        found += [answer.tokens, answer.emitted_per_step]
        whole = [*chat, *answer.tokens]
        chat = [*(whole if turn < 3 else whole[:-12]), *tokens_of(5, turn)]
    return found


@pytest.mark.parametrize("talk", [calls, turns])
def test_turns_that_start_after_what_a_slot_holds_change_no_token(artifact: Path, talk: Talk) -> None:
    """Chats in turns, together and alone, after steps with accepted and with rejected drafts."""
    with load(artifact, share_prefixes=False) as alone:
        plain, whole = talk(alone, {"speculate": False}), talk(alone, {})
        assert alone.stats()["shared_tokens"] == 0
    with load(artifact) as shared:
        if talk is turns:
            shared.ranks.copy_row = None  # so that a chat goes on in its row, or not at all
        found = talk(shared, {})
        assert shared.stats()["shared_tokens"] > 50
    assert found == whole
    assert found[::2] == plain[::2]
    gained = {count for counts in found[1::2] for count in counts}
    assert len(gained) > 1
    assert min(gained) < STEPS + 1
