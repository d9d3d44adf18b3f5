"""Near-ties: a difference is excused only by the gap of its logits, and only that one."""

import pytest

from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.losslessness import Comparison, Rivals, compare, losslessness
from pipeline.validate.gates.scoring import score
from support.eager import make_engine
from support.reports import recipe_of

PROMPT = [5, 6, 7, 30]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    work = tmp_path_factory.mktemp("lossless")
    recipe = recipe_of("llama", 6, "bfloat16")
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def greedy(engine, tokens: list[int], count: int) -> list[int]:
    """Greedy continuation by the `score` graph, which also judges."""
    spec = next(g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv == 48)
    for _ in range(count):
        tokens = [*tokens, int(score(engine, spec, [tokens])[0][-1].argmax())]
    return tokens


def judged(engine, plain: list[int], other: list[int], tie: float) -> Comparison:
    return compare(engine, [Rivals("K=2", "p", PROMPT, plain, other)], tie)


def findings(compared: Comparison, near_tie_rate: float) -> tuple[str, ...]:
    return losslessness(compared, 0.0, near_tie_rate).findings


def test_flip_is_a_near_tie_up_to_its_gap_and_a_fault_beyond(engine):
    plain = greedy(engine, PROMPT, 8)[4:]
    spec = next(g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv == 48)
    logits = score(engine, spec, [[*PROMPT, *plain[:3]]])[0][-1]
    best, second = logits.topk(2).values.tolist()
    gap = (best - second) / float(logits.abs().max())
    flipped = [*plain[:3], int(logits.topk(2).indices[1])]
    other = greedy(engine, [*PROMPT, *flipped], 4)[4:]
    excused = judged(engine, plain, other, gap * 1.01)
    assert [(d.position, d.near_tie) for d in excused.differences] == [(7, True)]
    assert excused.differences[0].gap == pytest.approx(gap)
    assert findings(excused, near_tie_rate=0.2) == ()
    assert "exceed the rate" in findings(excused, near_tie_rate=0.01)[0]
    beyond = judged(engine, plain, other, gap * 0.99)
    assert "position 7" in findings(beyond, near_tie_rate=1.0)[0]


def test_near_tie_excuses_nothing_that_follows(engine):
    plain = greedy(engine, PROMPT, 8)[4:]
    spec = next(g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv == 48)
    second = int(score(engine, spec, [[*PROMPT, *plain[:3]]])[0][-1].topk(2).indices[1])
    other = greedy(engine, [*PROMPT, *plain[:3], second], 4)[4:]
    worst = int(score(engine, spec, [[*PROMPT, *other[:6]]])[0][-1].argmin())
    found = judged(engine, plain, [*other[:6], worst, *other[7:]], tie=0.5)
    assert (10, False) in [(d.position, d.near_tie) for d in found.differences]


def test_answer_that_ends_early_is_a_fault(engine):
    plain = greedy(engine, PROMPT, 8)[4:]
    found = judged(engine, plain, plain[:5], tie=1.0)
    assert [(d.position, d.speculative, d.near_tie) for d in found.differences] == [(9, -1, False)]


def test_equal_answers_differ_nowhere(engine):
    plain = greedy(engine, PROMPT, 8)[4:]
    found = judged(engine, plain, plain, tie=0.0)
    assert found.differences == ()
    assert found.tokens == 8
