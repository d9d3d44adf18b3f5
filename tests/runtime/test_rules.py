"""Requests with rules: each answer is the one that the rules give, token by token, with and without speculation."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.errors import InputError
from pipeline.graphs.arguments import ScoreRow, score_arguments
from pipeline.recipe.schema import Recipe
from pipeline.runtime.rules import NO_RULES, Rules, RuleState
from pipeline.sources.pair import resolve_pair
from pipeline.speculation.shaping import allowed_bits
from support.eager import make_engine
from support.parallel_drafts import write_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFTS = {
    "draft_model": {"derive": {"from": "target", "layers": [0]}},
    "eagle3": {"source": "pico://llama?eagle3=1&draft_vocab=128"},
}
PROMPTS = [[7], [5, 9, 3, 40, 2], [12] * 20, [80, 81, 82, 83, 84, 85, 80, 81, 82, 83]]
SCHEMA = json.dumps({
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 2}, "count": {"enum": [1, 12, 345]}},
    "required": ["name", "count"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
})  # fmt: skip
RULES = {
    "penalties": Rules(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2),
    "rewards": Rules(presence_penalty=-0.3, repetition_penalty=0.9),
    "bias": Rules(logit_bias=((11, 4.0), (12, -100.0), (200, 2.0))),
    "allowed": Rules(allowed_token_ids=(3, 31, 32, 63, 64, 200)),
    "bad words": Rules(bad_words=((11,), (31, 32), (64, 64)), allowed_token_ids=(11, 31, 32, 63, 64)),
    "log probabilities": Rules(logprobs=3),
    "everything": Rules(repetition_penalty=1.1, logit_bias=((2, 9.0),), min_tokens=4, logprobs=0, bad_words=((9, 9),)),
}
NEUTRAL = Rules(logprobs=0)
SAMPLED = {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "seed": 5}


def engine_of(work, method: str, sampling=("greedy", "stochastic", "shaped"), batch=(1, 3), **speculation):
    recipe = Recipe.model_validate(
        {
            "name": "rules",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": DRAFTS.get(method, {"source": "draft"}),
            "speculation": {"method": method, "draft_tokens": (2, 4), "sampling": sampling, "lookup": 2, **speculation},
            "shapes": {"batch": batch, "prefill": (8, 16), "kv": (32, 64)},
        }
    )
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


def logits_after(engine, tokens: list[int]) -> list[float]:
    """The target's logits after a sequence, from empty caches."""
    spec = max((g for g in engine.graphs if (g.phase, g.model) == ("score", "target")), key=lambda g: g.kv)
    engine.ranks.reset()
    for start in range(0, len(tokens), spec.tokens):
        piece = tokens[start : start + spec.tokens]
        out = engine.ranks.run(spec, score_arguments(spec, {0: ScoreRow(piece, start)}, engine.length))["logits"]
    return out[0, len(piece) - 1].tolist()


def follow(engine, prompt: list[int], rules: Rules, count: int) -> list[int]:
    """Greedy decoding by rules, one token at a time, in plain Python."""
    answer: list[int] = []
    while len(answer) < count:
        scores = logits_after(engine, prompt + answer)
        for token, value in rules.logit_bias:
            scores[token] += value
        for token in {*prompt, *answer}:
            factor = rules.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        for token in set(answer):
            scores[token] -= rules.presence_penalty + rules.frequency_penalty * answer.count(token)
        banned = set(engine.manifest.eos_ids) if len(answer) < rules.min_tokens else set()
        banned |= {word[-1] for word in rules.bad_words if [*answer, word[-1]][-len(word) :] == list(word)}
        if rules.allowed_token_ids is not None:
            banned |= set(range(len(scores))) - set(rules.allowed_token_ids)
        for token in banned:
            scores[token] = -math.inf
        answer.append(max(range(len(scores)), key=lambda token: (scores[token], -token)))
        if answer[-1] in engine.manifest.eos_ids:
            break
    return answer


@pytest.mark.parametrize(
    ("method", "rules"),
    [
        pytest.param(method, rules, id=f"{method}-{name}",
                     marks=[] if method == "eagle3" or name == "everything" else [pytest.mark.slow])
        for method in DRAFTS for name, rules in RULES.items()
    ],
)  # fmt: skip
def test_greedy_answers_follow_the_rules(tmp_path, method, rules):
    """More prompts than rows, of one token, of a bucket and longer; every K, no draft, and alone."""
    engine = engine_of(tmp_path, method)
    expected = [follow(engine, prompt, rules, 5) for prompt in PROMPTS]
    for how in ({"draft_tokens": 2}, {"draft_tokens": 4}, {"speculate": False}):
        answers = engine.generate(PROMPTS, max_new_tokens=5, rules=rules, **how)
        assert [answer.tokens for answer in answers] == expected, how
    assert [engine.generate([p], max_new_tokens=5, rules=rules)[0].tokens for p in PROMPTS] == expected


@pytest.mark.parametrize("method", DRAFTS)
def test_sampled_answers_depend_on_the_seed_alone(tmp_path, method):
    """By rules, too: the same tokens with drafts and without; rules that change nothing give those without rules."""
    engine, rules = engine_of(tmp_path, method), Rules(min_p=0.02, presence_penalty=0.2)
    ways = ({"draft_tokens": 2}, {"draft_tokens": 4}, {"speculate": False})
    first, *others = ([a.tokens for a in engine.generate(PROMPTS, max_new_tokens=9, rules=rules, **SAMPLED, **how)]
                      for how in ways)  # fmt: skip
    assert others == [first, first]
    plain, neutral = (engine.generate(PROMPTS, max_new_tokens=9, rules=r, **SAMPLED) for r in (NO_RULES, NEUTRAL))
    assert [a.tokens for a in plain] == [a.tokens for a in neutral]


@pytest.mark.parametrize("method", DRAFTS)
def test_proposals_are_those_of_the_fused_graph(tmp_path, method):
    """With rules that change nothing, steps emit what fused steps emit: proposals and caches are the same."""
    engine = engine_of(tmp_path, method)
    fused, split = (
        engine.generate(PROMPTS[1:], max_new_tokens=15, draft_tokens=4, rules=rules) for rules in (NO_RULES, NEUTRAL)
    )
    for one, other in zip(fused, split, strict=True):
        assert one.tokens == other.tokens
        assert one.accepted == pytest.approx(other.accepted, abs=4)  # without a prefill graph's first token


@pytest.mark.parametrize("method", ["p_eagle", "dflash", "dspark"])
def test_split_steps_leave_a_parallel_draft_the_state_of_fused_ones(tmp_path, method):
    write_parallel(tmp_path / "draft", method)
    answers, states = [], []
    for rules in (NO_RULES, NEUTRAL):
        engine = engine_of(tmp_path, method)
        answers += engine.generate([PROMPTS[3]], max_new_tokens=14, draft_tokens=4, rules=rules)
        states.append(engine.ranks.state())
    assert answers[0].tokens == answers[1].tokens
    assert max(answers[1].emitted_per_step) > 1
    known = len(PROMPTS[3]) + len(answers[0].tokens) - 2
    for name in (name for name in states[0] if name.startswith(("draft/k", "draft/v"))):
        fused, split = (state[name][0, :, :known] for state in states)
        torch.testing.assert_close(split, fused, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", DRAFTS)
def test_log_probabilities_are_the_targets(tmp_path, method):
    engine = engine_of(tmp_path, method)
    (answer,) = engine.generate([PROMPTS[1]], max_new_tokens=8, rules=Rules(logprobs=5))
    assert len(answer.logprobs) == len(answer.tokens)
    for place, (token, found) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        wanted = torch.tensor(logits_after(engine, PROMPTS[1] + answer.tokens[:place])).log_softmax(dim=0)
        assert found.token == token
        assert found.rank == 1  # greedy
        assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(wanted.topk(5).values.tolist(), abs=1e-4)
        assert found.top[0][0] == token


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", DRAFTS)
def test_answers_are_of_the_schema(tmp_path, method, how):
    """Every answer that ended is JSON of the schema, and each unfinished one its beginning."""
    engine, rules = engine_of(tmp_path, method), Rules(json_schema=SCHEMA)
    answers = engine.generate(PROMPTS, max_new_tokens=30, rules=rules, **how)
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        if answer.finish_reason == "stop":
            found = json.loads(answer.text)
            assert set(found) == {"name", "count"}
            assert found["count"] in {1, 12, 345}
            assert len(found["name"]) <= 2
        else:
            assert answer.text.startswith("{")
    plain = engine.generate(PROMPTS, max_new_tokens=30, rules=rules, **how | {"speculate": False})
    assert [answer.tokens for answer in plain] == [answer.tokens for answer in answers]
    assert sum(answer.accepted for answer in answers) > len(answers)  # `{"name":` has no alternative


@pytest.mark.parametrize(
    ("rules", "where", "what"),
    [
        (Rules(min_p=1.5), "min_p", "0 (off) to 1"),
        (Rules(presence_penalty=3.0), "presence_penalty", "-2 to 2"),
        (Rules(repetition_penalty=0.0), "repetition_penalty", "more than 0"),
        (Rules(logprobs=21), "logprobs", "0 to 20"),
        (Rules(logit_bias=((100_000, 1.0),)), "logit_bias", "token id 100000"),
        (Rules(logit_bias=((1, math.nan),)), "logit_bias", "NaN"),
        (Rules(allowed_token_ids=()), "allowed_token_ids", "at least one"),
        (Rules(bad_words=((),)), "bad_words", "at least one token"),
        (Rules(min_tokens=-1), "min_tokens", "0 or more"),
        (Rules(json_schema="{"), "json_schema", "JSON"),
        (Rules(json_schema='{"type": "nothing"}'), "json_schema", "nothing"),
    ],
)
def test_rules_out_of_range_are_rejected_by_name(tmp_path, rules, where, what):
    engine = engine_of(tmp_path, "draft_model")
    with pytest.raises(InputError) as caught:
        engine.generate(PROMPTS, rules=rules)
    assert caught.value.where == where
    assert what in f"{caught.value.what}; {caught.value.fix}"


@pytest.mark.parametrize("how", [{}, {"speculate": False}])
def test_rules_that_exclude_each_other_end_the_answer(tmp_path, how):
    """Without an allowed token every score is -inf, and the graph would choose the last id."""
    engine = engine_of(tmp_path, "draft_model")
    rules = Rules(allowed_token_ids=(31, 32), bad_words=((31,), (32,)))
    [answer] = engine.generate([PROMPTS[1]], max_new_tokens=5, rules=rules, **how)
    assert (len(answer.tokens), answer.finish_reason) == (1, "stop")


def test_ids_beyond_the_models_vocabulary_are_left_out():
    """A tokenizer may have more ids than its model; a server's end tokens and bad words come from the tokenizer."""
    state = RuleState(Rules(min_tokens=2, bad_words=((70,), (5,))), [1, 2], 64, [3, 99])
    found = state.at([1, 2], [], None).allowed_TW
    assert found is not None
    assert not allowed_bits(found[None], 64)[0, 0, [3, 5]].any()
    assert int(allowed_bits(found[None], 64).sum()) == 62


def test_rules_need_shaped_graphs(tmp_path):
    engine = engine_of(tmp_path, "draft_model", sampling=("greedy", "stochastic"))
    with pytest.raises(InputError, match="shaped graphs were not built") as caught:
        engine.generate(PROMPTS, rules=Rules(min_p=0.1))
    assert caught.value.where == "min_p"


@pytest.mark.slow
def test_ten_thousand_sampled_answers_are_of_the_schema(tmp_path):
    """At temperatures up to 2, with drafts: no token outside the grammar is ever emitted."""
    engine = engine_of(tmp_path, "eagle3", batch=(64,))
    rules, prompts, seen = Rules(json_schema=SCHEMA), [[3 + n % 90, 5, 9] for n in range(500)], set()
    for run in range(20):
        how = {"temperature": 0.5 + run % 4 / 2, "seed": run, "draft_tokens": (2, 4)[run % 2]}
        for answer in engine.generate(prompts, max_new_tokens=30, rules=rules, **how):
            assert answer.finish_reason == "stop"
            found = json.loads(answer.text)
            assert set(found) == {"name", "count"}
            assert found["count"] in {1, 12, 345}
            assert len(found["name"]) <= 2
            seen.add(answer.text)
    assert len(seen) > 100
