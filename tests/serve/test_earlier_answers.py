"""A real vLLM drafts from earlier answers: tokens, acceptance in its metrics, tenants (`make test-vllm`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm_server import RECIPE, Server, built, prompts, running

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ANSWER = 40
ASKED = prompts(12)[6:]


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny pair with prompt lookup, which drafts from answers need."""
    recipe = RECIPE.replace(", stochastic, shaped", "").replace("draft_tokens: [2]", "draft_tokens: [2], lookup: 3")
    assert "lookup: 3, sampling: [greedy]}" in recipe
    return built(tmp_path_factory.mktemp("copying"), recipe)


@pytest.fixture(scope="module")
def expected(copying: Path) -> list[list[int]]:
    """Answers of the engine, which keeps none."""
    from pipeline import runtime

    with runtime.load(copying) as engine:
        return [answer.tokens for answer in engine.generate(ASKED, max_new_tokens=ANSWER)]


@pytest.fixture(scope="module")
def remembering(copying: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokens = ("--additional-config", '{"tandem": {"remember_tokens": 10000}}')
    with running(copying, tmp_path_factory.mktemp("log") / "vllm.log", *tokens) as server:
        yield server


def steps_of(server: Server, expected: list[list[int]], *salts: str) -> tuple[int, int]:
    """Ask everything once, with these salts in turn, and compare the tokens; return steps and accepted drafts."""
    before = server.metrics()
    for number, (prompt, tokens) in enumerate(zip(ASKED, expected, strict=True)):
        how = {"cache_salt": salts[number % len(salts)]} if salts else {}
        assert server.complete(prompt, max_tokens=ANSWER, **how)["token_ids"] == tokens
    after = server.metrics()
    drafts, accepted = (int(after[name] - before.get(name, 0)) for name in ("num_drafts", "num_accepted_tokens"))
    return drafts, accepted


def test_an_answer_is_drafted_from_an_earlier_one_of_the_same_tenant_alone(
    remembering: Server, expected: list[list[int]]
) -> None:
    """A second answer is copied from the first; a tenant that asks first takes as many steps as any other did."""
    first = steps_of(remembering, expected, "one")
    again = steps_of(remembering, expected, "one")
    other = steps_of(remembering, expected, "another")
    unsalted = steps_of(remembering, expected)
    assert first == other == unsalted, "no answer of another tenant was used"
    (drafts, accepted), (few, more) = first, again
    assert more > accepted
    assert few < drafts
    assert more > 1.7 * few, "of two drafts in a step nearly all are accepted"


def test_without_the_option_an_answer_is_not_kept(
    copying: Path, remembering: Server, expected: list[list[int]], tmp_path: Path
) -> None:
    """Off by default; the first answer of a tenant takes as many steps as without the option."""
    with running(copying, tmp_path / "log") as plain:
        first, again = steps_of(plain, expected), steps_of(plain, expected)
    assert first == again
    assert first == steps_of(remembering, expected, *(f"tenant {number}" for number in range(len(ASKED))))


def test_an_artifact_without_lookup_is_refused(artifact: Path, tmp_path: Path) -> None:
    server = Server(artifact, tmp_path / "log", "--additional-config", '{"tandem": {"remember_tokens": 10}}')
    assert server.process.wait(timeout=240) != 0
    assert "additional-config.tandem.remember_tokens" in server.log.read_text()
