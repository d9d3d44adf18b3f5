"""Prompt lookup beside a draft: what is copied, that it never decides the output, and that it saves steps."""

import pytest
import torch

from pipeline.backends.base import make_backend
from pipeline.cache.local import Cache
from pipeline.graphs.arguments import Choice, StepRow, step_arguments
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec
from pipeline.plan.plan import make_plan
from pipeline.progress import no_log
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.recipe.schema import Recipe
from pipeline.runtime.calls import Settings
from pipeline.runtime.lookup import Lookup
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from support.eager import make_engine
from support.pairs import make_pair, seeds
from support.reports import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFTS = {"eagle3": "pico://llama?draft_vocab=128&eagle3=1", "draft_model": "pico://llama?draft_vocab=128"}


def brute_force(tokens: list[int], size: int, most: int) -> list[int]:
    """What followed the newest earlier occurrence of the last `size` tokens."""
    for end in range(len(tokens) - 1, size - 1, -1):
        if tokens[end - size : end] == tokens[-size:]:
            return tokens[end : end + most]
    return []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_lookup_finds_the_newest_occurrence(size):
    """A growing sequence, asked at irregular times, more than once, against a search from the end."""
    generator = torch.Generator().manual_seed(size)
    tokens, lookup, found = [], Lookup(), 0
    while len(tokens) < 300:
        tokens += torch.randint(4, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator).tolist()
        wanted = brute_force(tokens, size, 4)
        assert lookup.find(tokens, size, 4) == lookup.find(tokens, size, 4) == wanted
        assert lookup.find(tokens, size, 1) == wanted[:1]
        found += bool(wanted)
    assert found > 20


def test_argument_leaves_the_rest_to_the_draft():
    rows = {1: StepRow(5, 3, copied=[7, 8]), 2: StepRow(5, 3)}
    copied = step_arguments(GraphSpec("speculate", 3, 5, 64, 4), rows)["copied"]
    assert copied.tolist() == [[-1] * 4, [7, 8, -1, -1], [-1] * 4]
    assert copied.dtype == torch.int32


@pytest.mark.parametrize("wrong_at", [0, 2, 4])
def test_a_step_accepts_copies_up_to_the_first_wrong_one(wrong_at):
    """A draft that is always wrong: whatever is right was copied. What comes after is not disturbed by it."""
    pair = make_pair("none", rows=1)
    prompt = [5, 9, 3]
    truth = pair.greedy(prompt, 12)
    tokens = [*prompt, int(pair.prefill([prompt])[0])]
    spec = GraphSpec("speculate", 1, 5, 40, 4)
    copied = truth[1:5]
    if wrong_at < 4:
        copied[wrong_at] = (copied[wrong_at] + 1) % 61
    step = {"last_token": tokens[-1:], "position": [len(tokens) - 1], "active": torch.tensor([True])}
    new, count = pair.step(spec, **step, copied=[copied])
    assert int(count) == wrong_at + 1
    assert new[0, : wrong_at + 1].tolist() == truth[1 : wrong_at + 2]
    tokens += new[0, : wrong_at + 1].tolist()
    while len(tokens) < len(prompt) + 10:
        step = {"last_token": tokens[-1:], "position": [len(tokens) - 1], "active": torch.tensor([True])}
        new, count = pair.step(spec, **step, copied=[[-1] * 4])
        tokens += new[0, : int(count)].tolist()
    assert tokens[len(prompt) :][:10] == truth[:10]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_copies_do_not_move_the_distribution(share):
    """Sampling with copies in some rows, likely ones and impossible ones: the first token against the target's own."""
    from scipy.stats import chisquare

    rows, rounds, steps = 400, 10, 2
    pair = make_pair("some", rows=rows, length=16)
    prompt = [5, 9, 3]
    for model in ("target", "draft"):
        pair.step(GraphSpec("score", rows, 3, 16, model=model), tokens=[prompt] * rows, position=[0] * rows)
    probs = torch.softmax(pair.logits("target", prompt)[-1].double(), 0)
    likely = probs.argsort(descending=True)[:3]
    counts = torch.zeros(61, dtype=torch.float64)
    for turn in range(rounds):
        copied = torch.full((rows, steps), -1)
        copied[: int(share * rows), 0] = int(likely[turn % 3])
        copied[: int(share * rows), 1] = 60
        tokens, _ = pair.step(
            GraphSpec("speculate", rows, steps + 1, 16, steps, "stochastic"),
            last_token=[prompt[-1]] * rows, position=[2] * rows, active=torch.ones(rows, dtype=torch.bool),
            temperature=torch.ones(rows), top_k=[0] * rows, top_p=torch.ones(rows),
            seed=seeds(rows, turn), copied=copied,
        )  # fmt: skip
        counts += torch.bincount(tokens[:, 0].long(), minlength=61)
    expected = probs * rows * rounds
    large = expected >= 5
    seen = torch.cat((counts[large], counts[~large].sum()[None]))
    wanted = torch.cat((expected[large], expected[~large].sum()[None]))
    assert chisquare(seen.numpy(), (wanted * (seen.sum() / wanted.sum())).numpy()).pvalue > 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("lookup")


def recipe_of(method: str, lookup: int | None, steps=(2, 4), costs=None, kv=(32, 64)) -> Recipe:
    speculation = {"method": method, "draft_tokens": steps, "sampling": ("greedy", "stochastic"), "lookup": lookup}
    return Recipe.model_validate(
        {
            "name": "copying",
            "target": {"source": "pico://llama", "dtype": "float32"},
            "draft": {"source": DRAFTS[method]},
            "speculation": speculation | ({"step_costs": costs} if costs else {}),
            "shapes": {"batch": (1, 4), "prefill": (16, 32), "kv": kv},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


def engine_of(work, recipe: Recipe):
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


TEXTS = [[5, 9, 3, 5, 9, 3, 5, 9], [7] * 6, [1, 2, 3, 4, 5, 6, 8], [11, 30]]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("method", DRAFTS)
def test_the_engine_copies_and_says_the_same(work, method, steps, rows):
    engine = engine_of(work, recipe_of(method, 1))
    plain = engine.generate(TEXTS[:rows], max_new_tokens=50, speculate=False)
    engine.ranks.reset()
    copying = engine.generate(TEXTS[:rows], max_new_tokens=50, draft_tokens=steps)
    assert [a.tokens for a in copying] == [a.tokens for a in plain]
    assert engine.stats()["copies"] > 0
    assert engine.stats()["catch_ups"] == 0


def test_copies_save_steps_where_text_repeats(work):
    """The same answer in fewer steps than with the draft alone."""
    taken = {}
    for lookup in (None, 2):
        answers = engine_of(work, recipe_of("eagle3", lookup)).generate(TEXTS, max_new_tokens=50, draft_tokens=4)
        taken[lookup] = sum(answer.steps for answer in answers)
    assert taken[2] < taken[None]


def test_pace_judges_copies_by_copies(work):
    """With the head always wrong, K is chosen where a copy is at hand, and plain decode elsewhere."""
    engine = engine_of(work, recipe_of("eagle3", 2, costs=(1.2, 1.4)))
    row = engine._row(0, [5, 9, 3, 4, 5, 9], Settings(max_new_tokens=8, seed=0, choice=Choice()))
    for _ in range(200):
        row.drafted.record_step(0, 4)
        row.copied.record_step(4, 4)
    assert engine.batch.choose_draft_tokens(engine.batch.draft_length_policy(), {0: row}) == 4
    row.tokens.append(50)
    assert engine.batch.choose_draft_tokens(engine.batch.draft_length_policy(), {0: row}) == 0


@pytest.mark.parametrize("method", ["eagle3", pytest.param("draft_model", marks=pytest.mark.slow)])
def test_gates_pass_and_drive_copies(work, method):
    """Losslessness and exact sampling, with copies in the steps of every graph."""
    recipe = recipe_of(method, 3, kv=(64,))
    pair = resolve_pair(recipe, base=work, cache=work / "sources")
    engine = make_engine(recipe, pair)
    asked = []
    run = engine.ranks.run
    engine.ranks.run = lambda spec, given: (asked.append((spec.name, given)), run(spec, given))[1]
    chosen = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(PROMPTS)]
    gates = run_gates(GateInputs(engine, recipe, chosen, pair, Cache(work / "cache", "goldens"), no_log))
    assert gates.passed, gates.findings
    copied = {name for name, given in asked if (given.get("copied", torch.tensor(-1)) >= 0).any()}
    assert copied == {graph.name for graph in engine.graphs if graph.phase == "speculate"}


def test_only_speculation_with_lookup_is_another_graph(work):
    """Graphs of other phases keep their inputs, what is traced, and so their keys."""
    without, with_it = recipe_of("eagle3", None), recipe_of("eagle3", 3)
    pair = resolve_pair(without, base=work, cache=work / "sources")
    plans = [make_plan(recipe, pair[0].config, pair[1].config) for recipe in (without, with_it)]
    for spec in plans[0].graphs:
        ios = [signature(spec, plan.pair, PlainPacking()) for plan in plans]
        assert (ios[0] == ios[1]) == (spec.phase != "speculate"), spec.name
    backend, decode = make_backend(InductorSettings()), GraphSpec("decode", 1, 1, 32)
    graphs = [backend.trace(decode, plan.pair).ir for plan in plans]
    assert graphs[0] == graphs[1]
