"""Tuning: the arithmetic of K, the measurement on an engine, and what is written into a recipe."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from pipeline.errors import InputError, RecipeError
from pipeline.measure.buckets import buckets_for, padded
from pipeline.measure.tune import _costs_by_tokens, choose, curve, tokens_of, tune, write_recipe
from pipeline.progress import no_progress
from pipeline.recipe import Recipe, load
from pipeline.sources.pair import resolve_pair
from pipeline.validate.prompts import Prompt
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

COSTS = {2: 1.2, 4: 1.4}


def test_tokens_follow_from_rates():
    assert tokens_of([0.5, 0.5], 0) == 1
    assert tokens_of([0.5, 0.4], 2) == pytest.approx(1 + 0.5 + 0.2)
    assert tokens_of([0.5, 0.4], 3) == pytest.approx(1 + 0.5 + 0.2 + 0.08)


def test_costs_lie_on_the_line_through_what_was_measured():
    found = choose({1: {64: COSTS}}, {"all": [0.5] * 4})
    assert found.cost(0) == 1
    assert [found.cost(k) for k in (2, 3, 4, 6)] == pytest.approx([1.2, 1.3, 1.4, 1.6])
    assert choose({1: {64: {4: 1.4}}}, {"all": [0.5] * 4}).cost(2) == pytest.approx(1.2)


@pytest.mark.parametrize(("rate", "wanted"), [(0.2, 1), (0.5, 2), (0.9, 8)])
def test_more_is_drafted_where_more_is_accepted(rate, wanted):
    """By hand: argmax over K of (1 - a^(K+1)) / (1 - a) / (1 + 0.1 K)."""
    found = choose({1: {64: COSTS}}, {"all": [rate] * 4})
    best = max(range(1, 9), key=lambda k: sum(rate**i for i in range(k + 1)) / (1 + 0.1 * k))
    assert found.draft_tokens == [best] == [wanted]


def test_a_class_of_its_own_gets_a_k_of_its_own():
    found = choose({1: {64: COSTS}}, {"all": [0.5] * 4, "json": [0.95] * 4, "chat": [0.48] * 4})
    assert found.draft_tokens == [2, 8]
    assert found.to_json()["step_costs"] == pytest.approx([1.2, 1.8])


def test_costs_by_cached_tokens_and_the_schedule_of_all_requests():
    """By hand: 4 drafts emit 1.94 tokens where half are accepted, 2 emit 1.75."""
    found = choose({1: {64: {2: 1.2, 4: 1.3}, 128: {2: 1.3, 4: 1.5}}, 4: {64: {2: 1.8, 4: 2.5}, 128: {2: 1.9, 4: 3.0}},
                    8: {128: {2: 2.0, 4: 3.0}}, 16: {128: {2: 1.5, 4: 2.5}}}, {"all": [0.5] * 4})  # fmt: skip
    found = replace(found, draft_tokens=[2, 4])
    assert found.to_json()["step_costs"] == {
        1: {64: [1.2, 1.3], 128: [1.3, 1.5]}, 4: {64: [1.8, 2.5], 128: [1.9, 3.0]}, 8: [2.0, 3.0], 16: [1.5, 2.5],
    }  # fmt: skip
    assert found.schedule() == [[1, 1, 2], [2, 8, 0], [9, 16, 2]]
    assert found.cost(4) == 1.3
    alone = replace(found, by_shape={1: found.by_shape[1]})
    assert alone.to_json()["step_costs"] == {1: {64: [1.2, 1.3], 128: [1.3, 1.5]}}


def test_curve_is_a_page_that_names_every_class():
    page = curve(choose({1: {64: COSTS}}, {"all": [0.5] * 4, "<json>": [0.9] * 4}), "a<b")
    assert page.startswith("<!doctype html>")
    assert "&lt;json&gt;" in page
    assert "a&lt;b" in page
    assert page.count("<polyline") == 2


@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_the_best_there_are(seed):
    """Against all choices, by brute force."""
    rng = random.Random(seed)
    lengths = Counter(rng.choice([rng.randint(1, 60), rng.randint(100, 230)]) for _ in range(30))
    choices = range(32, 256, 32)
    best = {n: min(padded(lengths, [*c, 256]) for c in combinations(choices, n - 1)) for n in (1, 2, 3)}
    found = buckets_for(lengths, 256, 3, 32)
    assert found[-1] == 256
    assert padded(lengths, found) == best[len(found)]
    assert len(found) == 3 or best[len(found)] - best[len(found) + 1] <= 0.02 * sum(lengths.elements())


def test_a_bucket_that_saves_nothing_is_not_built():
    assert buckets_for(Counter([250, 240, 256]), 256, 3, 32) == [256]
    assert buckets_for(Counter([10, 20, 250]), 256, 3, 32) == [32, 256]
    assert padded(Counter([10, 300]), [32, 256]) == 32 + 256


RECIPES = {
    "flow": "speculation: {method: eagle3, draft_tokens: [1, 2], sampling: [greedy]}  # mine\n",
    "again": "speculation: {method: eagle3, draft_tokens: [1, 2], step_costs: [1.0, 2.0], sampling: [greedy]}\n",
    "block": "speculation:\n  method: eagle3\n  draft_tokens: [1, 2]  # chosen\n  sampling: [greedy]\n",
    "block again": "speculation:\n  method: eagle3\n  draft_tokens: [1]\n  step_costs: [1.5]\n  sampling: [greedy]\n",
}
COSTED = {
    "block list": "step_costs:\n  - 1.0  # K=1\n  - 2.0\n  # then\n",
    "block list indented": "step_costs:\n    - 1.0\n    - 2.0\n\n",
    "block by batch": "step_costs:\n    1: [1.0, 2.0]\n    # of four rows\n    4:\n      - 1.5\n      - 2.0\n",
    "flow": "step_costs: [1.0, 2.0]  # measured\n",
}
REST = """name: head
target: {source: "pico://llama", dtype: float32}
draft: {source: "pico://llama?draft_vocab=128&eagle3=1"}
shapes: {batch: [1], prefill: [32], kv: [64]}
"""


@pytest.mark.parametrize("layout", RECIPES)
def test_recipe_is_written_and_keeps_everything_else(tmp_path, layout):
    path = tmp_path / "head.yaml"
    path.write_text(REST + RECIPES[layout])
    write_recipe(path, choose({1: {64: COSTS}}, {"all": [0.5] * 4, "json": [0.95] * 4}), paced=True)
    recipe = load(path)
    assert recipe.speculation.draft_tokens == (2, 8)
    assert recipe.speculation.step_costs == (1.2, 1.8)
    assert recipe.speculation.sampling == ("greedy",)
    assert path.read_text().startswith(REST)
    assert ("#" in path.read_text()) == ("#" in RECIPES[layout])


@pytest.mark.parametrize("layout", COSTED)
@pytest.mark.parametrize("first", [True, False])
def test_costs_in_any_layout_are_replaced(tmp_path, layout, first):
    """Those in block style once stayed, and made the key one given twice."""
    path = tmp_path / "head.yaml"
    entries = ["  method: eagle3\n", "  draft_tokens: [1, 2]  # chosen\n"]
    entries.insert(0 if first else 2, "  " + COSTED[layout])
    path.write_text(REST.replace("batch: [1]", "batch: [1, 4]") + "speculation:\n" + "".join(entries) + "# end\n")
    write_recipe(path, choose({1: {64: COSTS}, 4: {64: {2: 1.5, 4: 2.0}}}, {"all": [0.5] * 4}), paced=True)
    assert load(path).speculation.step_costs == {1: (1.2,), 4: (1.5,)}
    assert "draft_tokens: [2]  # chosen\n" in path.read_text()
    assert path.read_text().endswith("# end\n")


def test_draft_tokens_in_block_style_are_replaced(tmp_path):
    path = tmp_path / "head.yaml"
    path.write_text(REST + "speculation:\n  draft_tokens:\n  - 1\n  - 2\n\n  # a head\n  method: eagle3\n")
    write_recipe(path, choose({1: {64: COSTS}}, {"all": [0.5] * 4}), paced=True)
    rest = "speculation:\n  draft_tokens: [2]\n  step_costs: [1.2]\n\n  # a head\n  method: eagle3\n"
    assert path.read_text() == REST + rest


def test_costs_that_come_first_in_braces_are_replaced(tmp_path):
    """A comma once stayed where they had been."""
    path = tmp_path / "head.yaml"
    path.write_text(REST + "speculation: {step_costs: [1.0, 2.0], method: eagle3, draft_tokens: [1, 2]}\n")
    write_recipe(path, choose({1: {64: COSTS}}, {"all": [0.5] * 4}), paced=True)
    assert path.read_text() == REST + "speculation: {step_costs: [1.2], method: eagle3, draft_tokens: [2]}\n"


def test_comments_are_not_taken_for_keys(tmp_path):
    path = tmp_path / "head.yaml"
    comment = "# draft_tokens: [4] was slower, step_costs: [1.4], kv: [128] too\n"
    path.write_text(comment + REST + "speculation:\n  " + comment + "  method: eagle3\n  draft_tokens: [1, 2] # now\n")
    write_recipe(path, replace(choose({1: {64: COSTS}}, {"all": [0.5] * 4}), shapes={"kv": [96]}), paced=True)
    assert load(path).speculation.step_costs == (1.2,)
    assert load(path).shapes.kv == (96,)
    after = "  method: eagle3\n  draft_tokens: [2] # now\n  step_costs: [1.2]\n"
    assert path.read_text() == comment + REST.replace("kv: [64]", "kv: [96]") + "speculation:\n  " + comment + after


@pytest.mark.parametrize(
    "text",
    [
        REST.replace("batch: [1]", "batch: [1, 2]") + RECIPES["flow"],
        REST.replace("batch: [1]", "batch: &k [1, 4]") + "speculation: {method: eagle3, draft_tokens: *k}\n",
    ],
    ids=["other batches than were measured", "an alias"],
)
def test_what_would_not_load_is_not_written(tmp_path, text):
    path = tmp_path / "head.yaml"
    path.write_text(text)
    load(path)
    found = choose({1: {64: COSTS}, 4: {64: {2: 1.5, 4: 2.0}}}, {"all": [0.5] * 4})
    with pytest.raises(InputError) as caught:
        write_recipe(path, found, paced=True)
    assert caught.value.where == str(path)
    assert caught.value.fix == "write draft_tokens: [2] and step_costs: {1: [1.2], 4: [1.5]}"
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_recipe_gets_its_buckets(tmp_path):
    path = tmp_path / "head.yaml"
    path.write_text(REST + RECIPES["flow"])
    write_recipe(
        path, replace(choose({1: {64: COSTS}}, {"all": [0.5]}), shapes={"prefill": [16, 32], "kv": [96]}), paced=True
    )
    assert load(path).shapes.prefill == (16, 32)
    assert load(path).shapes.kv == (96,)


@pytest.mark.parametrize("layout", RECIPES)
def test_recipe_gets_costs_for_every_batch(tmp_path, layout):
    path = tmp_path / "head.yaml"
    path.write_text(REST.replace("batch: [1]", "batch: [1, 4]") + RECIPES[layout])
    found = choose({1: {64: COSTS}, 4: {64: {2: 1.5, 4: 2.0}}}, {"all": [0.5] * 4})
    for _ in range(2):
        write_recipe(path, found, paced=True)
        assert load(path).speculation.step_costs == {1: (1.2,), 4: (1.5,)}
    path.write_text(path.read_text().replace("batch: [1, 4]", "batch: [1, 8]"))
    with pytest.raises(RecipeError, match=r"found costs for the batches \[1, 4\]; the buckets are \[1, 8\]"):
        load(path)


def test_recipe_with_a_draft_model_gets_k_alone(tmp_path):
    """It has no pace: with costs it would be refused."""
    path = tmp_path / "model.yaml"
    rest = REST.replace("&eagle3=1", "")
    path.write_text(rest + "speculation: {draft_tokens: [4]}\n")
    write_recipe(path, choose({1: {64: {4: 1.4}}}, {"all": [0.5] * 4}), paced=False)
    assert load(path).speculation.draft_tokens == (2,)
    assert load(path).speculation.step_costs is None


def test_recipe_that_inherits_its_k_is_refused(tmp_path):
    path = tmp_path / "head.yaml"
    path.write_text("base: other.yaml\n")
    with pytest.raises(InputError, match="draft_tokens"):
        write_recipe(path, choose({1: {64: COSTS}}, {"all": [0.5]}), paced=True)


def test_recipe_with_a_base_gets_what_it_writes_itself(tmp_path):
    """Its lines end as they did; buckets of the base stay the base's."""
    path, base = tmp_path / "head.yaml", tmp_path / "base.yaml"
    base.write_text("shapes: {batch: [1], prefill: [32], kv: [64]}\n")
    text = REST.replace("shapes: {batch: [1], prefill: [32], kv: [64]}\n", "shapes:\n    kv:  [64]  # tokens\n")
    text = ("base: base.yaml  # shared\n" + text + RECIPES["block"]).replace("\n", "\r\n")
    path.write_bytes(text.encode())
    found = replace(choose({1: {64: COSTS}}, {"all": [0.5] * 4}), shapes={"prefill": [16, 32], "kv": [96]})
    write_recipe(path, found, paced=True)
    assert load(path).shapes.kv == (96,)
    assert load(path).shapes.prefill == (32,)
    text = text.replace("kv:  [64]", "kv: [96]").replace("[1, 2]  # chosen", "[2]  # chosen\r\n  step_costs: [1.2]")
    assert path.read_bytes().decode() == text


def test_recipe_whose_comments_cannot_stay_is_not_written(tmp_path):
    path = tmp_path / "head.yaml"
    text = REST + "speculation: {method: eagle3,  # a head\n  draft_tokens: [1, 2]}\n"
    path.write_text(text)
    with pytest.raises(InputError, match="comments inside") as caught:
        write_recipe(path, choose({1: {64: COSTS}}, {"all": [0.5] * 4}), paced=True)
    assert caught.value.fix == "write draft_tokens: [2] and step_costs: [1.2]"
    assert path.read_text() == text


def test_measures_an_engine(tmp_path):
    """Eagerly on a tiny pair: every built K gets a cost, every class its rates."""
    content = {
        "name": "head",
        "target": {"source": "pico://llama", "dtype": "float32"},
        "draft": {"derive": {"from": "target", "layers": (0,)}},
        "speculation": {"draft_tokens": (1, 3)},
        "shapes": {"batch": (1, 2), "prefill": (32,), "kv": (64,)},
    }
    recipe = Recipe.model_validate(content)
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    prompts = [Prompt(f"p{i}", ("chat", "code")[i % 2], text) for i, text in enumerate(["The dog", "def add(", "Once"])]
    lines: list[str] = []
    shown: list[tuple[str, float, float]] = []
    found = tune(engine, prompts, 1, 12, lines.append, lambda *of: shown.append(of))
    assert set(found.step_costs) == {1, 3}
    assert all(cost > 0.5 for cost in found.step_costs.values())
    assert set(found.rates) == {"all", "chat", "code"}
    assert all(len(rates) == 3 and max(rates) <= 1 for rates in found.rates.values())
    assert lines == ["measured steps of 2 batch buckets"]
    steps = [("steps of 1", 0, 1), ("steps of 1", 1, 1), ("steps of 2", 0, 1), ("steps of 2", 1, 1)]
    assert shown == [*steps, ("prompts", 0, 2), ("prompts", 1, 2), ("prompts", 1, 1)]
    assert set(found.by_shape) == {1, 2}
    assert set(found.by_shape[2][64]) == {1, 3}
    assert set(found.to_json()["step_costs"]) == {1, 2}
    assert found.draft_tokens
    assert found.shapes == {"prefill": [32], "kv": [64]}
    now, then = found.padding["prefill"]
    assert now == then > 1


def test_costs_of_quarters_where_attention_reads_cached_keys_alone(tmp_path, monkeypatch):
    content = {
        "name": "head", "target": {"source": "pico://llama", "dtype": "float32"}, "speculation": {"draft_tokens": (1,)},
        "draft": {"source": "pico://llama"}, "shapes": {"batch": (1,), "prefill": (16,), "kv": (32, 64)},
    }  # fmt: skip
    recipe = Recipe.model_validate(content)
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    measured: list[int] = []
    monkeypatch.setattr("pipeline.measure.tune._costs", lambda _engine, _batch, at: measured.append(at) or {1: 1.5})
    monkeypatch.setattr("pipeline.measure.tune._reads_all", lambda _engine: False)
    assert _costs_by_tokens(engine, 1, no_progress) == {tokens: {1: 1.5} for tokens in (16, 32, 48, 64)}
    assert measured == [8, 24, 40, 56]
    monkeypatch.setattr("pipeline.measure.tune._reads_all", lambda _engine: True)
    assert set(_costs_by_tokens(engine, 1, no_progress)) == {32, 64}


def test_copies_are_a_class_of_their_own(tmp_path):
    """Their rate is that of the steps in which something was copied."""
    content = {
        "name": "copying",
        "target": {"source": "pico://llama", "dtype": "float32"},
        "draft": {"source": "pico://llama?draft_vocab=128&eagle3=1"},
        "speculation": {"method": "eagle3", "draft_tokens": (2,), "lookup": 1},
        "shapes": {"batch": (1,), "prefill": (32,), "kv": (128,)},
    }
    recipe = Recipe.model_validate(content)
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path))
    found = tune(engine, [Prompt("p", "chat", "one two one two one two")], 1, 60, lambda line: None)
    assert list(found.rates) == ["all", "chat", "copies"]
    assert list(found.expected) == ["all", "chat", "copies"]
    answer = engine.generate([engine.text.encode("one two one two one two")], max_new_tokens=60, draft_tokens=2)[0]
    assert len(answer.copied_per_step) == answer.steps
    assert any(answer.copied_per_step)
