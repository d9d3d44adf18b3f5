"""Requests of a server in the slots of a batch, as a scheduler drives them; and what serving refuses without vLLM."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest

from pipeline.errors import InputError
from pipeline.graphs.arguments import Choice
from pipeline.runtime.limits import check_choice
from pipeline.serve import plugin, settings
from pipeline.serve.requests import RequestSlots, served_request, wants_drafts
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.reports import recipe_of

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 3], [7, 8], [1, 2, 3, 4, 5, 6, 8], [4], [9, 9, 2], [3, 1]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return eager(tmp_path_factory.mktemp("serve"))


def eager(work, layers=(0,), lookup=None):
    recipe = recipe_of("llama", 4, "float32", ("greedy", "stochastic"), layers)
    recipe = recipe.model_copy(update={"speculation": recipe.speculation.model_copy(update={"lookup": lookup})})
    recipe = recipe.model_copy(update={"shapes": recipe.shapes.model_copy(update={"batch": (1, 4)})})
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


class Scheduler:
    """What vLLM's scheduler does with a worker's tokens: admits to free slots, cuts at a limit, drops.

    With `chunk`, beside running requests a step reads so many tokens of a prompt at most, and one prompt at a time.
    """

    def __init__(self, requests, slots, chunk=None):
        self.requests, self.slots, self.chunk = requests, slots, chunk
        self.read = {}
        self.running, self.answers, self.steps = {}, {}, []

    def run(self, waiting, seed=0, cancel=()):
        """Serve (name, request, limit) triples that arrive at random moments; returns their tokens."""
        dice, waiting, gone = random.Random(seed), list(waiting), []
        while waiting or self.running:
            room = self.slots - len(self.running)
            new = [waiting.pop(0) for _ in range(min(room, len(waiting), dice.randint(0, 2)))]
            if not new and not self.running:
                continue
            self.requests.drop(gone)
            self.steps.append(self.requests.planned)
            going = {name: self.requests.planned for name in self.running if name not in self.read}
            for name, asked, limit in new:
                self.running[name], self.answers[name] = limit, []
                self.read[name] = (0, asked.prompt)
            reading = {
                name: min(end, read + (self.chunk or end) if going else end) for name, (read, end) in self.read.items()
            }
            found = self.requests.step({name: asked for name, asked, _ in new}, going, None, reading).tokens
            assert found.keys() == self.running.keys()
            assert all(bool(found[name]) == (end == self.read[name][1]) for name, end in reading.items())
            self.read = {name: (end, self.read[name][1]) for name, end in reading.items() if end < self.read[name][1]}
            assert all(self.requests.is_reading(name) == (name in self.read) for name in found)
            gone = [name for name, tokens in found.items() if self._took(name, tokens, cancel)]
            for name in gone:
                del self.running[name]
        self.requests.drop(gone)
        return self.answers

    def _took(self, name, tokens, cancel):
        answer = self.answers[name]
        answer += tokens[: self.running[name] - len(answer)]
        return len(answer) >= self.running[name] or (name in cancel and len(answer) > 2)


def greedy(**how):
    return [(f"r{i}", served_request(prompt, Choice(), 0, **how), 6 + i) for i, prompt in enumerate(PROMPTS)]


def expected(engine, limit_of=lambda i: 6 + i):
    """Tokens of the engine alone, past any end-of-sequence token cut as the scheduler cuts."""
    return {
        f"r{i}": engine.generate([prompt], max_new_tokens=limit_of(i))[0].tokens for i, prompt in enumerate(PROMPTS)
    }


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go_get_the_engines_tokens(engine, seed, chunk):
    served = Scheduler(RequestSlots(engine.batch), 4, chunk).run(greedy(), seed)
    for name, tokens in expected(engine).items():
        assert served[name][: len(tokens)] == tokens


def test_prompts_share_what_slots_hold_and_the_scheduler_allows(engine):
    """The tokens are the engine's; a request may share no more than its blocks are worth."""
    system = list(range(3, 25))
    prompts = [[*system, 5 + i % 3, 9][: 23 + i % 2] for i in range(8)]
    alone = [engine.generate([prompt], max_new_tokens=5)[0].tokens for prompt in prompts]
    for most in (0, 16, 40):
        slots = RequestSlots(engine.batch)
        before = [slots.shared(prompt) for prompt in prompts]
        asked = [(f"r{i}", served_request(prompt, Choice(), 0, shared=most), 5) for i, prompt in enumerate(prompts)]
        served = Scheduler(slots, 4, 2).run(asked, most)
        assert [served[f"r{i}"][: len(tokens)] for i, tokens in enumerate(alone)] == alone
        assert before == [0] * 8
        assert slots.shared(prompts[0]) >= 22
        assert (slots.shared_tokens > 0) == (most > 0)


def test_a_sampled_neighbour_moves_no_greedy_row_and_repeats_itself(engine):
    hot = Choice(temperature=1.3, top_k=20)
    mixed = [(f"r{i}", served_request(PROMPTS[i], hot if i % 2 else Choice(), 11), 6 + i) for i in range(6)]
    again = [(f"r{i}", served_request(PROMPTS[i], hot if i % 2 else Choice(), 11), 6 + i) for i in range(6)]
    first, second = (Scheduler(RequestSlots(engine.batch), 4).run(asked, 2) for asked in (mixed, again))
    assert first == second
    alone = expected(engine)
    for name in ("r0", "r2", "r4"):
        assert first[name][: len(alone[name])] == alone[name]
    assert any(first[name][: len(alone[name])] != alone[name] for name in ("r1", "r3", "r5"))


NEIGHBOURS = {
    "greedy": lambda: served_request([7, 8], Choice(), 0),
    "without drafts": lambda: served_request([7, 8], Choice(), 0, speculate=False),
    "near the end of the cache": lambda: served_request(list(range(3, 35)), Choice(), 0),
    "sampled": lambda: served_request([7, 8], Choice(0.8, 5), 3),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_a_seed_gives_one_answer_whatever_runs_beside_it(engine, neighbour):
    """A neighbour that switched the K of all rows changed the draws of all."""
    for choice in (Choice(1.0), Choice(0.8, 12, 0.9)):
        alone = engine.generate([[5, 9, 3]], max_new_tokens=20, seed=7, top_k=choice.top_k, top_p=choice.top_p,
                                temperature=choice.temperature)[0].tokens  # fmt: skip
        beside = [("a", served_request([5, 9, 3], choice, 7), 20), ("b", NEIGHBOURS[neighbour](), 12)]
        for order in (beside, beside[::-1]):
            fresh = [(name, served_request(of.tokens[: of.prompt], of.choice, of.seed, speculate=of.speculate), limit)
                     for name, of, limit in order]  # fmt: skip
            assert Scheduler(RequestSlots(engine.batch), 4).run(fresh)["a"] == alone


@pytest.mark.parametrize(
    ("value", "wanted"), [("0", False), ("false", False), (False, False), (0, False), ("True", True)]
)
def test_a_request_may_exclude_drafts_in_any_form(value, wanted):
    assert wants_drafts(value) is wanted


@pytest.mark.parametrize("value", ["no", 2, None, [False]])
def test_another_value_is_an_error(value):
    with pytest.raises(InputError, match="speculate"):
        wants_drafts(value)


def test_more_tokens_than_the_graphs_keep_are_an_error(engine):
    """They were left out without a word."""
    pair = replace(engine.manifest.pair, candidates=40)
    manifest = engine.manifest.model_copy(update={"pair": pair})
    check_choice(manifest, Choice(1.0, 40))
    check_choice(manifest, Choice(0.0, 500))
    with pytest.raises(InputError, match="top_k: found 41; the artifact samples from the best 40 tokens"):
        check_choice(manifest, Choice(1.0, 41))


def test_cancelled_requests_free_their_slots(engine):
    scheduler = Scheduler(RequestSlots(engine.batch), 2)
    served = scheduler.run(greedy(), 1, cancel=("r1", "r3"))
    assert len(served) == len(PROMPTS)
    assert scheduler.requests._slots == {}


def test_under_load_and_on_request_rows_decode_plainly(engine):
    busy = Scheduler(RequestSlots(engine.batch, speculate_up_to=1), 4)
    assert busy.run(greedy()).keys() == expected(engine).keys()
    calm = Scheduler(RequestSlots(engine.batch, speculate_up_to=4), 4)
    calm.run(greedy())
    off = Scheduler(RequestSlots(engine.batch), 4)
    served = off.run(greedy(speculate=False))
    assert set(off.steps) == {0}
    assert sum(steps > 0 for steps in busy.steps) < sum(steps > 0 for steps in calm.steps)
    for name, tokens in expected(engine).items():
        assert served[name][: len(tokens)] == tokens


def test_a_step_that_a_limit_cuts_leaves_the_answer_alone(tmp_path):
    """A scheduler that leaves room for no draft, although one was planned: the draft must not skip what it misread."""
    engine = eager(tmp_path, layers=(0, 1, 2))  # the whole target as its draft: every draft is accepted
    [tokens] = (one.tokens for one in engine.generate([PROMPTS[2]], max_new_tokens=12))
    requests, asked = RequestSlots(engine.batch), served_request(PROMPTS[2], Choice(), 0)
    answer = list(requests.step({"r": asked, "other": served_request(PROMPTS[0], Choice(), 0)}, {}).tokens["r"])
    for step in range(6):
        room = requests.planned if step % 2 else 0
        answer += requests.step({}, {"r": room, "other": requests.planned}).tokens["r"]
        assert asked.in_draft <= asked.position
    kept = min(len(tokens), len(answer))
    assert answer[:kept] == tokens[:kept]


def test_more_requests_than_slots_is_a_bug_of_the_scheduler(engine):
    with pytest.raises(RuntimeError, match="free slots"):
        RequestSlots(engine.batch).step({str(i): served_request([5], Choice(), 0) for i in range(9)}, {})


def test_the_plugin_takes_artifacts_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.delenv(plugin.ARTIFACT, raising=False)
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", str(tmp_path)])
    assert plugin.platform() is None
    for name in ("manifest.json", "recipe.lock"):
        (tmp_path / name).write_text("{}")
    longest = '{"x": "' + "y" * 5000 + '"}'
    for words in ([str(tmp_path)], [f"--model={tmp_path}"], ["--additional-config", longest, "a\0b", str(tmp_path)]):
        monkeypatch.delenv(plugin.ARTIFACT, raising=False)
        monkeypatch.setattr(sys, "argv", ["vllm", "serve", *words])
        assert plugin.platform() == "pipeline.serve.platform.TandemPlatform"


def test_settings_leave_room_for_every_slot(engine):
    manifest = engine.manifest
    tokens = (settings.blocks(manifest) - 1) * settings.BLOCK
    assert tokens >= manifest.shapes.batch[-1] * (manifest.shapes.kv[-1] + max(manifest.draft_tokens))
    assert settings.most_tokens(manifest) == engine.length + 1


@pytest.mark.parametrize("given", [{"speculate_upto": 1}, {"speculate_up_to": "two"}, {"speculate_up_to": -1}, 3])
def test_options_are_checked(given):
    with pytest.raises(InputError) as caught:
        settings.options({"tandem": given})
    assert "tandem" in caught.value.where
    assert settings.options({}).speculate_up_to is None


@pytest.mark.parametrize(
    ("extra", "inputs", "found"),
    [
        (None, {"cache_salt": "a"}, {settings.SALT: "a"}),
        (None, {}, None),
        ({"speculate": False}, {"cache_salt": "a"}, {"speculate": False, settings.SALT: "a"}),
        ({settings.SALT: "b"}, {"cache_salt": "a"}, {settings.SALT: "a"}),
        ({settings.SALT: "b"}, {}, None),
        ({settings.SALT: "b"}, "text", None),
    ],
)
def test_salt_comes_from_the_request_and_not_from_its_extra_arguments(extra, inputs, found):
    """Else a client could read answers of another tenant, a draft at a time."""
    assert settings.with_salt(extra, inputs) == found


def test_answers_are_kept_by_salt(tmp_path):
    """Of two requests with one salt, the second copies more than with another salt, from the first."""
    engine = eager(tmp_path, lookup=3)

    def copies(first: str, second: str) -> int:
        slots = RequestSlots(engine.batch)
        engine.batch.remember_answers(10_000)
        before = 0
        for salt in (first, second):
            before = engine.batch.stats["copies"]
            request = served_request([5, 9, 3], Choice(), 0)
            request.tenant = salt
            step = slots.step({"one": request}, {})
            for _ in range(12):
                step = slots.step({}, {"one": len(slots.drafts("one"))})
            assert step.tokens["one"]
            slots.drop(["one"])
        return int(engine.batch.stats["copies"] - before)

    assert copies("a", "a") > copies("a", "b")
