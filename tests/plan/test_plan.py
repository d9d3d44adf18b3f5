"""Plans: which graphs, how many bytes (against arithmetic by hand), and what is refused before anything is built."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.backends.base import make_backend
from pipeline.errors import Problem, RecipeError
from pipeline.graphs.dtypes import DTYPES
from pipeline.graphs.packing import BlockPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec
from pipeline.models.config import Experts, Layer, Limit, ModelConfig
from pipeline.models.rope_types import Rope
from pipeline.models.weights import weight_specs
from pipeline.plan import lock as locks
from pipeline.plan.estimates import GIB, layer_passes
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import Recipe, find, load
from pipeline.recipe.backend_settings import InductorSettings
from support.paths import ROOT

SMALL = ModelConfig(
    family="llama",
    layers=3,
    hidden=64,
    intermediate=192,
    heads=8,
    kv_heads=4,
    head_dim=16,
    vocab=512,
    norm_eps=1e-6,
    max_position=2048,
    kinds=(Layer(Rope(1e4, 16)),),
)
RECIPE = """\
name: pair
target: {source: ./target}
draft: {source: ./draft, placement: %(placement)s}
speculation: {draft_tokens: [2, 4], sampling: %(sampling)s%(candidates)s}
shapes: {batch: [1, 4], prefill: [32, 48], kv: [64, 128]}
parallel: %(parallel)s
backend: %(backend)s
"""
DEFAULTS = {
    "placement": "replicated",
    "sampling": "[greedy, stochastic]",
    "tensor": 1,
    "backend": "{name: neuron, target: trn2, lnc: 2}",
}


def recipe_of(folder: Path, **changes: object) -> Recipe:
    path, words = folder / "pair.yaml", DEFAULTS | changes
    words.setdefault("parallel", f"{{tensor: {words['tensor']}}}")
    words.setdefault("candidates", ", candidates: 64" if "stochastic" in str(words["sampling"]) else "")
    path.write_text(RECIPE % words)
    return load(path)


def shipped(name: str) -> Plan:
    path = find(name, ROOT / "recipes")
    recipe = load(path)
    lock_path = locks.lock_path(path)
    return make_plan(recipe, *locks.pair_configs(recipe, locks.read(lock_path), str(lock_path)))


def problems_of(recipe: Recipe, target: ModelConfig = SMALL, draft: ModelConfig = SMALL) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe, target, draft)
    return caught.value.problems


def test_make_plan_lists_every_graph_once(tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path), SMALL, SMALL)
    names = [graph.name for graph in plan.graphs]
    assert len(set(names)) == len(names)
    counts = {
        phase: sum(g.phase == phase for g in plan.graphs) for phase in ("prefill", "decode", "speculate", "score")
    }
    # On a chip, prefill of empty rows (batch x prefill) and of one row that continues; batch x kv x sampling; the same
    # x K; kv x model.
    assert counts == {"prefill": 6, "decode": 8, "speculate": 16, "score": 4}
    assert "speculate-b4-t5-s128-k4-stochastic" in names
    assert "score-draft-b4-t32-s64" in names
    assert {g.kv for g in plan.graphs if g.phase == "prefill" and g.continues} == {128}
    assert all(g.kv == g.tokens for g in plan.graphs if g.phase == "prefill" and not g.continues)


def test_make_plan_greedy_only_prefills_greedily(tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path, sampling="[greedy]"), SMALL, SMALL)
    assert {graph.sampling for graph in plan.graphs} == {"greedy"}


def test_llama_70b_memory_is_what_arithmetic_gives() -> None:
    """Per rank, bfloat16, 64 ranks: a 64th of each model, one KV head of eight; 32 heads of the draft on 64 ranks."""
    memory = shipped("llama-70b-spec").memory
    vocabulary = 2016 * 8192  # 128,256 rows padded to 32 x 64, over 64 ranks
    attention = 8192 * (128 + 128 + 128 + 128)  # one of 64 query heads, one KV head (k, v), and the output
    mlp = 8192 * 448 * 3  # 28,672 / 64
    elements = 2 * vocabulary + 80 * (attention + mlp + 2 * 8192) + 8192
    assert memory.target_weights == 2 * elements + 4
    draft_attention = 2048 * (64 + 64 + 64 + 64)  # one head, or zeros in its place, and one KV head
    draft_elements = 2016 * 2048 + 16 * (draft_attention + 2048 * 128 * 3 + 2 * 2048) + 2048
    assert memory.draft_weights == 2 * draft_elements + 4
    assert memory.target_kv == 2 * 80 * 1 * 1 * 12800 * 128 * 2
    assert memory.draft_kv == 2 * 16 * 1 * 1 * 12800 * 64 * 2


def test_llama_70b_plan_fits_its_cores() -> None:
    plan = shipped("llama-70b-spec")
    assert plan.memory_limit == 24 * GIB
    assert 5 * GIB < plan.memory.total < 6 * GIB
    assert len(plan.graphs) == 16
    assert plan.graphs[0].name == "speculate-b1-t7-s4096-k6"
    # 70.6 billion parameters, and 1.2 of the draft; KV heads held eight times.
    assert 150 < plan.stored_bytes / GIB < 158
    assert plan.artifact_bytes == plan.stored_bytes


@pytest.mark.parametrize(("name", "graphs"), [("qwen3-32b-spec", 16), ("llama-8b-spec", 26)])
def test_neuron_recipes_plan_from_their_locks(name: str, graphs: int) -> None:
    plan = shipped(name)
    assert len(plan.graphs) == graphs
    assert plan.memory_limit is not None
    assert plan.memory.total < plan.memory_limit


@pytest.mark.parametrize("name", ["pico-spec", "smollm2-135m-spec"])
def test_cpu_recipes_plan_from_their_locks(name: str) -> None:
    plan = shipped(name)
    assert plan.memory_limit is None
    assert plan.memory.total < 4 * GIB


def test_smollm2_weights_are_those_that_its_graphs_take() -> None:
    plan = shipped("smollm2-135m-spec")
    score = next(g for g in plan.graphs if g.name.startswith("score-target"))
    found = 0
    for tensor in signature(score, plan.pair, BlockPacking()).weights:
        found += math.prod(tensor.shape) * DTYPES[tensor.dtype].size_bytes
    assert plan.memory.target_weights == found


def test_memory_falls_with_ranks_until_kv_heads_repeat(tmp_path: Path) -> None:
    plans = {tp: make_plan(recipe_of(tmp_path, tensor=tp, placement="sharded"), SMALL, SMALL) for tp in (1, 4, 8)}
    assert plans[1].memory.target_kv == 4 * plans[4].memory.target_kv
    assert plans[4].memory.target_kv == plans[8].memory.target_kv, "four KV heads on eight ranks: each held twice"
    assert plans[1].memory.target_weights > plans[4].memory.target_weights > plans[8].memory.target_weights


def test_memory_shared_embedding_is_stored_once(tmp_path: Path) -> None:
    own = make_plan(recipe_of(tmp_path), SMALL, SMALL).memory
    shared = make_plan(recipe_of(tmp_path), SMALL, replace(SMALL, shares_embedding=True)).memory
    assert own.draft_weights - shared.draft_weights == 512 * 64 * 4


def test_conflict_ranks_that_do_not_divide_are_all_named(tmp_path: Path) -> None:
    problems = problems_of(recipe_of(tmp_path, tensor=6))
    assert [p.what for p in problems] == ["found 6, which does not divide the target's num_key_value_heads=4"]
    assert problems[0].where == f"{tmp_path / 'pair.yaml'}:6: parallel.tensor"
    assert problems[0].fix == "use one of [1, 2, 4, 8]"


def test_conflict_intermediate_that_does_not_divide(tmp_path: Path) -> None:
    (problem,) = problems_of(recipe_of(tmp_path, tensor=8), replace(SMALL, intermediate=100))
    assert "intermediate_size=100" in problem.what
    assert problem.fix == "use one of [1, 2, 4]"


MIXTURE = replace(SMALL, kinds=(Layer(Rope(1e4, 16), experts=Experts(6, 2, 100, among=True)),))
BY_RANK = "{tensor: %s, enable_expert_parallel: true}"


def test_conflict_experts_that_do_not_divide_over_ranks(tmp_path: Path) -> None:
    """6 whole experts on 4 ranks; slices of them would divide, since 100 does."""
    make_plan(recipe_of(tmp_path, tensor=4), MIXTURE, SMALL)
    (problem,) = problems_of(recipe_of(tmp_path, parallel=BY_RANK % 4), MIXTURE, SMALL)
    assert problem.what == "found 4, which does not divide the target's number of experts=6"
    assert problem.fix == "use one of [1, 2]"
    (problem,) = problems_of(recipe_of(tmp_path, parallel=BY_RANK % 2), SMALL, SMALL)
    assert problem.what == "found true, but the models have no experts"


def test_whole_experts_on_ranks_take_the_memory_of_slices(tmp_path: Path) -> None:
    recipes = (recipe_of(tmp_path, tensor=2), recipe_of(tmp_path, parallel=BY_RANK % 2))
    slices, whole = (make_plan(recipe, MIXTURE, SMALL) for recipe in recipes)
    assert slices.memory.target_weights == whole.memory.target_weights
    assert slices.pair.target.expert_layers[0].by_rank is False
    assert whole.pair.target.expert_layers[0].by_rank is True


def test_conflict_sharded_draft_may_be_replicated_instead(tmp_path: Path) -> None:
    draft = replace(SMALL, heads=6, kv_heads=3)
    (problem,) = problems_of(recipe_of(tmp_path, tensor=4, placement="sharded"), SMALL, draft)
    assert "the draft's num_key_value_heads=3" in problem.what
    assert problem.fix == "use one of [1], or draft.placement: replicated"
    make_plan(recipe_of(tmp_path, tensor=4), SMALL, draft)


def test_conflict_vocabularies_that_differ(tmp_path: Path) -> None:
    """Padding may differ, unless the draft uses the target's embedding or names its ids."""
    recipe = recipe_of(tmp_path)
    make_plan(recipe, SMALL, replace(SMALL, vocab=500))
    for own in ({"shares_embedding": True}, {"draft_vocab": 100, "tied": False}):
        (problem,) = problems_of(recipe, SMALL, replace(SMALL, vocab=500, **own))
        assert problem.what == "the draft uses the target's vocabulary: its vocab_size must be 512, found 500"


def test_conflict_cache_longer_than_a_limit(tmp_path: Path) -> None:
    """Of LongRoPE, for example, whose frequencies change beyond the original length."""
    recipe = recipe_of(tmp_path)
    longest = recipe.shapes.kv[-1]
    make_plan(recipe, replace(SMALL, limits=(Limit("rope_scaling.longrope", longest),)), SMALL)
    limits = (Limit("rope_scaling.longrope", longest - 1), Limit("sliding_window", longest))
    problems = problems_of(recipe, replace(SMALL, limits=limits), SMALL)
    assert f"found {longest}, longer than the target's rope_scaling.longrope covers, {longest - 1}" in problems[-1].what
    assert problems[-1].fix == f"use kv buckets up to {longest - 1}"


def test_windows_limit_no_cache(tmp_path: Path) -> None:
    """Was: rejected, because attention had no windows."""
    make_plan(recipe_of(tmp_path), replace(SMALL, kinds=(Layer(Rope(1e4, 16), 8),)), SMALL)


def test_reduced_vocabulary_is_no_conflict(tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path), SMALL, replace(SMALL, draft_vocab=100, tied=False))
    assert plan.pair.draft.out_vocab == 100


def test_conflict_kv_bucket_longer_than_positions(tmp_path: Path) -> None:
    (problem,) = problems_of(recipe_of(tmp_path), SMALL, replace(SMALL, max_position=100))
    assert problem.where == f"{tmp_path / 'pair.yaml'}:5: shapes.kv[1]"
    assert "the draft's max_position_embeddings=100" in problem.what


def test_conflict_shared_embedding_of_another_size(tmp_path: Path) -> None:
    (problem,) = problems_of(recipe_of(tmp_path), SMALL, replace(SMALL, hidden=32, shares_embedding=True))
    assert "hidden_size must be 64, found 32" in problem.what


def test_conflict_memory_names_what_takes_it(tmp_path: Path) -> None:
    big = replace(SMALL, layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128)
    (problem,) = problems_of(recipe_of(tmp_path, tensor=8), replace(big, vocab=512), SMALL)
    assert "a core with lnc=2 has 24 GiB" in problem.what
    assert "target weights" in problem.what
    assert problem.fix == "use more ranks"


def test_conflict_memory_halves_without_lnc2(tmp_path: Path) -> None:
    backend = "{name: neuron, target: trn2, lnc: 1}"
    config = replace(SMALL, layers=60, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128)
    make_plan(recipe_of(tmp_path, tensor=8), config, SMALL)
    (problem,) = problems_of(recipe_of(tmp_path, tensor=8, backend=backend), config)
    assert "has 12 GiB" in problem.what


def test_estimates_grow_with_layer_passes(tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path), SMALL, SMALL)
    by_name = {graph.name: graph for graph in plan.graphs}
    decode, k4 = by_name["decode-b1-t1-s64"], by_name["speculate-b1-t5-s64-k4"]
    assert layer_passes(plan.pair, decode) == 3
    assert layer_passes(plan.pair, k4) == 3 + 4 * 3
    for estimate in (plan.compile_seconds, plan.compile_memory, plan.graph_bytes):
        assert estimate(k4) > estimate(decode) > 0


def test_a_graph_depends_on_what_it_sees_alone(tmp_path: Path) -> None:
    """What is traced, and so its cache key: scoring a target depends on no draft, no sampling, no end of an answer."""
    plan = make_plan(recipe_of(tmp_path), SMALL, SMALL)
    unseen = make_plan(recipe_of(tmp_path, sampling="[greedy]"), replace(SMALL, eos_ids=(7,)), replace(SMALL, layers=1))
    seen = make_plan(recipe_of(tmp_path), replace(SMALL, layers=2), SMALL)
    backend, spec = make_backend(InductorSettings()), GraphSpec("score", 4, 32, 64, model="target")
    graph, same, other = (backend.trace(spec, p.pair).ir for p in (plan, unseen, seen))
    assert graph == same != other


@pytest.mark.parametrize(
    ("name", "published"), [("llama-70b-spec", (70.6e9, 1.24e9)), ("qwen3-32b-spec", (32.8e9, 1.72e9))]
)
def test_parameters_are_those_of_the_published_models(name: str, published: tuple[float, float]) -> None:
    """The model cards say 70.6 and 1.24, 32.8 and 1.7 billion: what HBM is counted from."""
    plan = shipped(name)
    for config, billions in zip((plan.pair.target, plan.pair.draft), published, strict=True):
        count = sum(math.prod(spec.shape) for spec in weight_specs(config))
        assert abs(count / billions - 1) < 0.005, count


def test_published_deployments_fit_a_core() -> None:
    """AWS serves the 70B pair on 64 cores at 12,800 tokens, the 32B pair on 32 at batch 4; 4 cores do not hold 70B."""
    for name in ("llama-70b-spec", "qwen3-32b-spec"):
        plan = shipped(name)
        assert plan.memory_limit is not None
        assert plan.memory.total < 0.5 * plan.memory_limit
    big = shipped("llama-70b-spec")
    few = big.recipe.model_copy(update={"parallel": big.recipe.parallel.model_copy(update={"tensor": 4})})
    with pytest.raises(RecipeError, match="a rank needs"):
        make_plan(few, big.pair.target, big.pair.draft)


def test_stochastic_graphs_on_neuron_need_a_number_of_candidates() -> None:
    big = shipped("llama-8b-spec")
    speculation = big.recipe.speculation.model_copy(update={"candidates": None})
    recipe = big.recipe.model_copy(update={"speculation": speculation})
    with pytest.raises(RecipeError, match="neuron needs the number of tokens"):
        make_plan(recipe, big.pair.target, big.pair.draft)
