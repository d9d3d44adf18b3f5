"""Ring caches of layers with windows: tokens, drafts and caches are those of whole caches, for several turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from pipeline.graphs.arguments import Choice, StepRow, step_arguments
from pipeline.graphs.spec import PairSpec, Ring
from pipeline.plan import plan as planning
from pipeline.plan.rings import rings_of
from pipeline.recipe.schema import Recipe
from pipeline.runtime.batch import Row
from pipeline.runtime.engine import Engine
from pipeline.runtime.prefixes import Held, Prefixes
from pipeline.sources.pair import resolve_pair
from support import families
from support.eager import EagerRanks, make_engine
from support.split_ranks import SplitRanks

pytestmark = pytest.mark.usefixtures("one_thread")

KV, CHUNK, STEPS = 200, 24, 4
SAMPLED = {"temperature": 1.1, "top_k": 20, "seed": 5}
PAIRS = {name: families.FAMILIES[name] for name in ("gemma3", "gpt-oss", "olmo3")}
PAIRS["mistral"] = families.Family("Mistral", {"sliding_window": 7}, "json-config")  # no layer has a whole cache

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "gpt-oss", "olmo3")]
EVERY = ["mistral", *SLOW]

EngineOf = Callable[..., Engine]


def tight(models, graphs) -> tuple[Ring, ...]:
    """The shortest rings that hold a window and what one call writes."""
    widest = max(max(graph.tokens, graph.draft_tokens + 1) for graph in graphs)
    windows = {kind.window for config in models for kind in config.kinds if kind.window}
    return tuple(Ring(window, window - 1 + widest) for window in sorted(windows))


@pytest.fixture
def engine_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineOf:
    def make(
        family: str, rings=tight, *, ranks=EagerRanks, share=False, tensor=1, device="cpu", prefill=(8, CHUNK), **more
    ) -> Engine:
        root = tmp_path / family
        if not root.exists():
            (tmp_path / f"{family}.json").write_text(json.dumps(families.write_pair(PAIRS[family], root)))
        recipe = Recipe.model_validate(
            {
                "name": "rings",
                "target": {"source": "target", "dtype": "float32", **more},
                "draft": json.loads((tmp_path / f"{family}.json").read_text()),
                "speculation": {"draft_tokens": (2, STEPS), "sampling": ("greedy", "stochastic"), "lookup": 2},
                "shapes": {"batch": (1, 4), "prefill": prefill, "kv": (24, 64, KV)},
                "parallel": {"tensor": tensor},
                "backend": {"name": "inductor", "device": device},
            }
        )
        monkeypatch.setattr(planning, "rings_of", rings)
        return make_engine(recipe, resolve_pair(recipe, base=root, cache=root / "sources"), ranks, share_prefixes=share)

    return make


def whole(models, graphs) -> tuple[Ring, ...]:
    return ()


def tokens_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 330, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def lengths(engine: Engine) -> set[int]:
    return {tensor.shape[2] for tensor in engine.ranks.state().values() if tensor.dim() == 4}


@pytest.mark.parametrize("how", [{}, {"speculate": False}, SAMPLED], ids=["speculation", "decode", "sampled"])
@pytest.mark.parametrize("family", EVERY)
def test_answers_and_drafts_are_those_of_whole_caches(engine_of, family, how):
    """Prompts of one chunk and of many, up to the end of the caches; rows are used again by shorter requests."""
    prompts = [tokens_of(length, length) for length in (3, 120, 8, 24, 25, 61, 190, 40, 7, 150)]
    rings, plain = engine_of(family), engine_of(family, whole)
    answers, expected = (engine.generate(prompts, max_new_tokens=45, **how) for engine in (rings, plain))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.emitted_per_step for answer in answers] == [answer.emitted_per_step for answer in expected]
    assert min(lengths(rings)) <= 7 + CHUNK < KV == max(lengths(plain))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_graphs_for_empty_rows_fill_rings_too(engine_of, family):
    """Of backends where prompts begin in graphs without a cache: the keys of the pass itself go into the rings."""
    prompts = [tokens_of(length, length) for length in (3, 24, 25, 110, 8)]
    answers, expected = (
        engine_of(family, rings, device="cuda").generate(prompts, max_new_tokens=40) for rings in (tight, whole)
    )
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.emitted_per_step for answer in answers] == [answer.emitted_per_step for answer in expected]


@pytest.mark.parametrize("family", EVERY)
def test_every_rejected_draft_leaves_the_keys_that_are_still_seen(engine_of, family):
    """Steps that accept 0, 1, .. K of K drafts in turn, at every slot of the rings: what decode steps give."""
    engine, prompt = engine_of(family, prefill=(STEPS + 1,)), tokens_of(20, 1)
    row = Row(list(prompt), len(prompt), 0, Choice())
    row.tokens.append(engine.batch.prefill({0: row})[0])
    for _ in range(140):
        row.tokens += engine.batch.decode({0: row})[0]
    known = row.tokens
    for shift in range(STEPS + 1):
        engine.batch.prefill({0: Row(list(prompt), len(prompt), 0, Choice())})
        tokens, turn = known[: len(prompt) + 1], shift
        spec = next(g for g in engine.graphs if (g.phase, g.draft_tokens, g.batch, g.kv) == ("speculate", STEPS, 1, KV))
        while len(tokens) + STEPS < len(known):
            right = turn % (STEPS + 1)
            drafts = known[len(tokens) :][:right]
            drafts += [(known[len(tokens) + right] + 1) % 330] * (STEPS - right)
            row = StepRow(tokens[-1], len(tokens) - 1, copied=drafts)
            out = engine.ranks.run(spec, step_arguments(spec, {0: row}))
            assert int(out["count"][0]) == right + 1
            tokens += out["tokens"][0, : right + 1].tolist()
            turn += 1
        assert tokens == known[: len(tokens)]
    assert min(lengths(engine)) <= 7 + STEPS + 1


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_draft_that_fell_behind_catches_up(engine_of, family):
    """Decode steps leave the draft's ring behind by less and by more than it holds; its drafts are the same then."""
    found = []
    for rings in (tight, whole):
        engine, emitted = engine_of(family, rings), []
        prompts = [tokens_of(length, length) for length in (9, 60)]
        rows = {slot: Row(list(prompt), len(prompt), 0, Choice()) for slot, prompt in enumerate(prompts)}
        for slot, token in engine.batch.prefill(rows).items():
            rows[slot].tokens.append(token)
        for decodes in (1, 2, 7, 30, 45):
            for _ in range(decodes):
                for slot, new in engine.batch.decode(rows).items():
                    rows[slot].tokens += new
            for steps in (STEPS, 2):
                for slot, new in engine.batch.speculate(rows, steps).items():
                    rows[slot].tokens += new
                    emitted.append(new)
        found.append((emitted, engine.batch.stats["catch_ups"]))
    assert found[0] == found[1]
    assert found[0][1] >= 8


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gemma3", {}), ("gpt-oss", {"weights": "int8"}))),
    ],
)
def test_two_ranks_give_the_tokens_of_one(engine_of, family, more):
    prompts = [tokens_of(length, length) for length in (3, 70, 25)]
    one, two = (engine_of(family, ranks=SplitRanks, tensor=tensor, **more) for tensor in (1, 2))
    answers, expected = (engine.generate(prompts, max_new_tokens=40) for engine in (two, one))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    plain = engine_of(family, whole, ranks=SplitRanks, tensor=2, **more).generate(prompts, max_new_tokens=40)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]


def chats(engine: Engine, how: dict) -> list[list[int]]:
    """A chat that grows and one in turns with it, prompts with one beginning, and a return to an earlier point."""
    system, found = tokens_of(40, 0), []

    def ask(*prompts: list[int]) -> list[list[int]]:
        answers = engine.generate(list(prompts), max_new_tokens=9, **how)
        found.extend(part for answer in answers for part in (answer.tokens, answer.emitted_per_step))
        return [answer.tokens for answer in answers]

    chat, other = [*system, 5], [*system[:30], 9, 9]
    for turn in range(4):
        chat += ask(chat)[0] + tokens_of(8 + turn, turn)
        other += ask(other)[0] + tokens_of(3, 10 + turn)
    ask(*[[*system, *tokens_of(2 + 3 * number, 20 + number)] for number in range(6)])
    ask(chat, chat, other, system, system[:17], chat[:90], chat[:70], [*chat[:-3], 7, 8])
    return found


@pytest.mark.parametrize("how", [{}, SAMPLED, {"speculate": False}], ids=["speculation", "sampled", "decode"])
@pytest.mark.parametrize("family", ["mistral", *SLOW[:2]])
def test_prefixes_are_shared_as_far_as_rings_hold_them(engine_of, family, how):
    shared, all_shared = engine_of(family, share=True), engine_of(family, whole, share=True)
    expected = chats(engine_of(family, whole), how)
    assert chats(shared, how) == expected
    assert chats(all_shared, how) == expected
    assert 200 < shared.stats()["shared_tokens"] < all_shared.stats()["shared_tokens"]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_prefix_is_shared_up_to_the_limit_of_the_rings(engine_of, family, copies):
    """At every distance before the end of a prompt that a slot holds: shared or read, the caches are the same."""
    engine, prompt, counts = engine_of(family, share=True), tokens_of(150, 2), []
    if not copies:
        engine.ranks.copy_row = None
    (ring,) = {ring.slots: ring for ring in engine.manifest.pair.rings}.values()
    for back in (0, 1, ring.back - 1, ring.back, ring.back + 1, 60, 100):
        engine.prefixes = Prefixes(engine.batch)
        engine.batch.read_to({0: len(prompt)}, {0: (row := Row(list(prompt), len(prompt), 0, Choice()))})
        engine.prefixes.end(0, replace(row, tokens=[*prompt, 7]))
        cut = [*prompt[: len(prompt) - back], 1, 2, 3]
        request = Row(list(cut), len(cut), 0, Choice())
        slot = engine.prefixes.begin(request, [0, 1, 2, 3], {})
        counts.append(request.read)
        engine.batch.read_to({slot: len(cut)}, {slot: request})
        found = held(engine, slot, len(cut))
        engine.batch.read_to({slot: len(cut)}, {slot: Row(list(cut), len(cut), 0, Choice())})
        for name, expected in held(engine, slot, len(cut)).items():
            torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert counts == [150, 149, 150 - ring.back + 1, 0, 0, 0, 0]


def held(engine: Engine, slot: int, count: int) -> dict[str, torch.Tensor]:
    """The last window of keys and values of a row, and all of a whole cache."""
    found = {}
    for name, tensor in engine.ranks.state().items():
        if tensor.dim() == 4:
            window = 6 if tensor.shape[2] < KV else count
            positions = torch.arange(count - window, count) % (tensor.shape[2] - 1)
            found[name] = tensor[slot][:, positions].clone()
    return found


def test_what_was_written_over_is_not_held():
    """By rejected drafts, padding, and the row that a prefix was copied from."""
    rings = (Ring(6, 29), Ring(9, 32))
    tokens = list(range(100))
    assert Held(tokens[:20], 29).shared(tokens[:7], rings) == 7
    assert Held(tokens[:20], 30).shared(tokens[:7], rings) == 7  # position 0 is lost, which none of them sees
    assert Held(tokens[:20], 30).shared(tokens[:6], rings) == 0
    assert [Held(tokens, 100).shared(tokens[:count], rings) for count in (76, 77, 100)] == [0, 77, 100]
    assert [Held(tokens, 103).shared(tokens[:count], rings) for count in (79, 80)] == [0, 80]
    assert Held(tokens, 100).shared(tokens[:50], ()) == 50


def test_rows_know_the_end_of_all_that_was_written(engine_of):
    """Rejected drafts and padding count; so does the row that a prefix comes from."""
    engine = engine_of("gemma3", share=True)
    row = Row(tokens_of(30, 1), 30, 0, Choice())
    row.tokens.append(engine.batch.prefill({0: row})[0])
    assert row.written == 30
    for _ in range(2):
        row.tokens += engine.batch.decode({0: row})[0]
    assert (row.position, row.written) == (32, 32)
    row.tokens += (new := engine.batch.speculate({0: row}, STEPS)[0])
    assert row.written == 30 + 8 + (0 if len(new) else 1)  # a catch-up of the draft pads its piece to 8 tokens
    engine.prefixes.end(0, row)
    other = Row([*row.tokens[:-1], 5, 6], row.position + 2, 0, Choice())
    engine.prefixes.begin(other, [0, 1], {})
    assert other.read == row.position
    assert other.written == row.written


def test_a_ring_is_not_longer_than_the_whole_cache(engine_of):
    """The plan keeps whole caches where a ring would not be shorter."""
    engine = engine_of("gemma3", planning_rings)
    assert engine.manifest.pair.rings == (Ring(6, 128),)
    graphs = [replace(graph, kv=min(graph.kv, 129)) for graph in engine.graphs]
    models = engine.manifest.pair.models
    assert planning_rings((models.target, models.draft), graphs) == ()


def planning_rings(models, graphs) -> tuple[Ring, ...]:
    return rings_of(models, graphs)


@pytest.mark.parametrize("family", PAIRS)
def test_the_memory_of_the_plan_is_that_of_the_caches(engine_of, family, monkeypatch):
    plans = []
    monkeypatch.setattr("support.eager.make_plan", lambda *given: plans.append(planning.make_plan(*given)) or plans[-1])
    sizes = []
    for rings in (planning_rings, whole):
        engine = engine_of(family, rings)
        engine.generate([tokens_of(9, 0)], max_new_tokens=3)
        allocated = {
            role: sum(
                tensor.numel() * tensor.element_size()
                for name, tensor in engine.ranks.state().items()
                if name.startswith(f"{role}/") and tensor.dim() == 4
            )
            for role in ("target", "draft")
        }
        assert allocated == {"target": plans[-1].memory.target_kv, "draft": plans[-1].memory.draft_kv}
        sizes.append(allocated["target"])
    assert sizes[0] < sizes[1]


def test_a_pair_of_an_earlier_artifact_has_whole_caches(engine_of):
    """Whose manifest has no rings."""
    adapter, pair = TypeAdapter(PairSpec), engine_of("gemma3").manifest.pair
    data = adapter.dump_python(pair, mode="json")
    assert adapter.validate_python(data) == pair
    del data["rings"]
    earlier = adapter.validate_python(data)
    assert {earlier.cache_length("target", layer) for layer in range(3)} == {KV}
