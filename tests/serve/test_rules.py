"""Requests with rules in a server's slots, as vLLM's scheduler drives them: they get the engine's tokens."""

from __future__ import annotations

import json
import random

import pytest

from pipeline.errors import InputError
from pipeline.graphs.arguments import GREEDY, Choice
from pipeline.recipe.schema import Recipe
from pipeline.runtime.grammar import Grammars
from pipeline.runtime.prompt_scores import prompt_logprobs
from pipeline.runtime.rules import NO_RULES, Rules, RuleState
from pipeline.serve.requests import RequestSlots, served_request
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [4] * 20, [9, 9, 2], [3, 1]]
SCHEMA = json.dumps({
    "type": "object", "properties": {"count": {"enum": [1, 12, 345]}}, "required": ["count"],
    "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
})  # fmt: skip
RULES = [
    Rules(presence_penalty=0.5, repetition_penalty=1.2),
    NO_RULES,
    Rules(logit_bias=((11, 5.0),), logprobs=2),
    Rules(json_schema=SCHEMA),
    Rules(allowed_token_ids=(3, 31, 64)),
    NO_RULES,
]
CHOICES = [GREEDY, Choice(1.1, 30), GREEDY, GREEDY, Choice(0.9), GREEDY]


@pytest.fixture(scope="module", params=["draft_model", "eagle3"])
def engine(request, tmp_path_factory):
    work = tmp_path_factory.mktemp("ruled")
    drafts = {
        "draft_model": {"derive": {"from": "target", "layers": [0]}},
        "eagle3": {"source": "pico://llama?eagle3=1&draft_vocab=128"},
    }
    recipe = Recipe.model_validate(
        {
            "name": "ruled",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": drafts[request.param],
            "speculation": {
                "method": request.param, "draft_tokens": (3,), "lookup": 2,
                "sampling": ("greedy", "stochastic", "shaped"),
            },
            "shapes": {"batch": (1, 3), "prefill": (16,), "kv": (64,)},
        }
    )  # fmt: skip
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


class Scheduler:
    """vLLM's part: admits requests, checks drafts by grammars, computes masks, and drops what has ended."""

    def __init__(self, engine, seed: int) -> None:
        self.engine, self.dice = engine, random.Random(seed)
        self.slots = RequestSlots(engine.batch)
        self.grammars = Grammars(engine.text.as_json(), engine.manifest.vocab, engine.manifest.eos_ids)
        self.running: dict[str, tuple] = {}
        self.answers: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}

    def run(self, numbers, limit: int) -> dict[str, list[int]]:
        waiting = list(numbers)
        while waiting or self.running:
            room = self.slots.batch.slots - len(self.running)
            new = [waiting.pop(0) for _ in range(min(room, len(waiting), self.dice.randint(0, 2)))]
            if new or self.running:
                self._step(new, limit)
        return self.answers

    def _step(self, numbers, limit: int) -> None:
        going = {name: len(self.drafts[name]) for name in self.running}
        new = {}
        for number in numbers:
            name, rules = f"r{number}", RULES[number]
            grammar = self.grammars.of_schema(SCHEMA) if rules.json_schema else None
            manifest, prompt = self.engine.manifest, PROMPTS[number]
            state = RuleState(rules, prompt, manifest.vocab, manifest.eos_ids) if rules.asked else None
            new[name] = served_request(prompt, CHOICES[number], 7, rules=state)
            self.running[name], self.answers[name], self.drafts[name] = (grammar,), [], []
        masks = {
            name: grammar.masks(self.drafts[name]) for name, (grammar,) in self.running.items() if grammar is not None
        }
        step = self.slots.step(new, going, masks)
        assert step.tokens.keys() == self.running.keys()
        gone = []
        for name, tokens in step.tokens.items():
            (grammar,), answer = self.running[name], self.answers[name]
            ends = [at for at, token in enumerate(tokens) if token in self.engine.manifest.eos_ids]
            answer += tokens[: ends[0] + 1 if ends else None][: limit - len(answer)]
            if grammar is not None:
                grammar.accept(tokens)
            proposed = self.slots.drafts(name)
            self.drafts[name] = proposed if grammar is None else grammar.drafts(proposed, 0) or valid(grammar, proposed)
            if len(answer) >= limit or ends:
                gone.append(name)
        for name in gone:
            del self.running[name]
        self.slots.drop(gone)


def valid(grammar, proposed: list[int]) -> list[int]:
    """The proposed drafts that a grammar allows, as vLLM's `validate_tokens`."""
    kept = grammar.drafts(proposed, len(proposed))
    return [token for token, wanted in zip(proposed, kept, strict=False) if token == wanted][: len(kept)]


@pytest.mark.parametrize("seed", range(3))
def test_requests_with_rules_get_the_engines_tokens(engine, seed):
    """Requests join and leave; rows with rules share steps with rows without."""
    served = Scheduler(engine, seed).run(range(len(PROMPTS)), 12)
    for number, (prompt, rules, choice) in enumerate(zip(PROMPTS, RULES, CHOICES, strict=True)):
        how = {"temperature": choice.temperature, "top_k": choice.top_k, "top_p": choice.top_p, "seed": 7}
        [expected] = engine.generate([prompt], max_new_tokens=12, rules=rules, **how)
        assert served[f"r{number}"] == expected.tokens, number


def test_drafts_of_rows_with_rules_are_real_and_accepted(engine):
    """The scheduler checks them by a grammar, so placeholders would be dropped."""
    slots = RequestSlots(engine.batch)
    state = RuleState(Rules(logprobs=1), PROMPTS[0], engine.manifest.vocab, engine.manifest.eos_ids)
    step = slots.step({"a": served_request(PROMPTS[0], GREEDY, 0, rules=state)}, {})
    [expected] = engine.generate([PROMPTS[0]], max_new_tokens=20)
    tokens, most = list(step.tokens["a"]), 0
    while len(tokens) < 15:
        assert len(slots.drafts("a")) == 3
        step = slots.step({}, {"a": 3})
        assert len(step.logprobs["a"]) == len(step.tokens["a"])
        most = max(most, len(step.tokens["a"]))
        tokens += step.tokens["a"]
    assert tokens[:15] == expected.tokens[:15]
    assert most > 1


def test_proposals_of_an_earlier_position_are_not_verified(engine):
    """After a request with rules has ended, fused steps run; the next one found proposals for a position long past."""
    slots = RequestSlots(engine.batch)
    state = RuleState(Rules(logprobs=1), PROMPTS[0], engine.manifest.vocab, engine.manifest.eos_ids)
    plain = served_request(PROMPTS[2], GREEDY, 0)
    slots.step({"ruled": served_request(PROMPTS[0], GREEDY, 0, rules=state), "plain": plain}, {})
    assert len(plain.proposed) == 3
    slots.drop(["ruled"])
    slots.step({}, {"plain": slots.planned})
    assert plain.proposed == []
    again = RuleState(Rules(logprobs=1), PROMPTS[1], engine.manifest.vocab, engine.manifest.eos_ids)
    slots.step({"next": served_request(PROMPTS[1], GREEDY, 0, rules=again)}, {"plain": slots.planned})
    assert plain.in_draft <= plain.position
    [expected] = engine.generate([PROMPTS[2]], max_new_tokens=12)
    answer = plain.tokens[plain.prompt :]
    kept = min(len(answer), len(expected.tokens))
    assert answer[:kept] == expected.tokens[:kept]


def test_log_probabilities_of_prompts_come_with_the_first_step(engine):
    requests = {f"r{n}": served_request(prompt, GREEDY, 0, prompt_logprobs=2) for n, prompt in enumerate(PROMPTS[:3])}
    step = RequestSlots(engine.batch).step(requests, {})
    rows = dict(enumerate(requests.values()))
    expected = prompt_logprobs(engine.batch, rows, 2)
    for number, prompt in enumerate(PROMPTS[:3]):
        found = step.prompts[f"r{number}"]
        assert [each.token for each in found] == prompt[1:]
        assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected[number]])
        assert all(each.rank >= 1 and len(each.top) == 2 for each in found)


def test_a_schema_is_checked_before_the_first_step(engine):
    with pytest.raises(InputError, match="json_schema"):
        Grammars(engine.text.as_json(), engine.manifest.vocab, engine.manifest.eos_ids).of_schema("[")
