"""Forecasts: what was recorded on this machine, else estimates corrected by it; clusters by list scheduling."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pipeline.models.config import Layer, ModelConfig
from pipeline.models.rope_types import Rope
from pipeline.plan.estimates import ESTIMATES, HEADERS_S, Work, pace_of
from pipeline.plan.forecast import cluster, forecast, makespan
from pipeline.plan.history import CompiledGraph, History, PastBuild, machine
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import Recipe

WORK = Work(10, 32)
SMALL = ModelConfig(
    family="llama", layers=3, hidden=64, intermediate=192, heads=8, kv_heads=4, head_dim=16, vocab=512, norm_eps=1e-6,
    max_position=2048, kinds=(Layer(Rope(1e4, 16)),),
)  # fmt: skip


def make_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "pair",
            "target": {"source": "./target"},
            "draft": {"source": "./draft"},
            "speculation": {"draft_tokens": [2, 4]},
            "shapes": {"batch": [1, 4], "prefill": [32, 48], "kv": [64, 128]},
        }
    )


@pytest.fixture
def plan() -> Plan:
    return make_plan(make_recipe(), SMALL, replace(SMALL, layers=1))


def built(plan: Plan, slower: float, **stages: float) -> PastBuild:
    """A build of a plan in which each graph took `slower` times its estimate."""
    graphs = tuple(
        CompiledGraph(
            graph=plan.graph_digest(spec), kind=spec.kind, estimated_s=plan.compile_seconds(spec),
            seconds=slower * plan.compile_seconds(spec), memory_bytes=7, size_bytes=9,
        )
        for spec in plan.graphs
    )  # fmt: skip
    estimated = {"shard": 1.0, "gates": 10.0, "reference": 20.0}
    return PastBuild(
        machine=machine(), plan=plan.digest(WORK), cost=plan.cost_kind, estimates=ESTIMATES, workers=2, graphs=graphs,
        stages=stages, estimated=estimated,
    )  # fmt: skip


def other(plan: Plan) -> Plan:
    """The same graphs for other models."""
    target = replace(plan.pair.target, layers=plan.pair.target.layers + 1)
    return make_plan(plan.recipe, target, plan.pair.draft)


def test_without_records_estimates_hold(plan):
    expected = forecast(plan, WORK, [])
    assert {name: graph.seconds for name, graph in expected.graphs.items()} == {
        spec.name: plan.compile_seconds(spec) for spec in plan.graphs
    }
    assert not any(graph.recorded for graph in expected.graphs.values())
    assert expected.basis == "rough estimates, up to several times too low: no build was recorded on this machine"
    compile_s = HEADERS_S + sum(plan.compile_seconds(spec) for spec in plan.graphs)
    assert expected.total_s(1) == pytest.approx(compile_s + sum(expected.stages.values()))


def test_without_records_the_kind_of_processor_counts(plan):
    """With products of bfloat16 pairs the gates take less than half the time; a record of this machine decides."""
    plain, faster = forecast(plan, WORK, []), forecast(plan, WORK, [], pace_of({"sse", "avx512_bf16"}))
    assert forecast(plan, WORK, [], pace_of({"sse", "avx2"})) == plain
    assert faster.compile_s(2) == pytest.approx(0.7 * plain.compile_s(2))
    assert faster.stages["gates"] == pytest.approx(0.37 * plain.stages["gates"])
    assert faster.stages["shard"] == plain.stages["shard"]
    recorded = [built(plan, 1.0, gates=30.0)]
    assert forecast(plan, WORK, recorded, pace_of({"avx512_bf16"})).graphs == forecast(plan, WORK, recorded).graphs


def test_a_graph_takes_what_it_took(plan):
    builds = [built(plan, 3.0, gates=50.0, reference=70.0), built(plan, 2.0, gates=40.0), built(plan, 9.0, gates=90.0)]
    expected = forecast(plan, WORK, builds)
    assert expected.graphs[plan.graphs[0].name].seconds == pytest.approx(3 * plan.compile_seconds(plan.graphs[0]))
    assert expected.graphs[plan.graphs[0].name].recorded
    assert expected.stages["gates"] == 50.0  # the median
    assert expected.stages["reference"] == 0.0  # cached by then
    assert (expected.graphs_bytes, expected.basis) == (9 * len(plan.graphs), "estimates from 3 recorded builds")


def test_references_of_a_build_that_ended_before_its_gates_are_not_cached(plan):
    expected = forecast(plan, WORK, [built(plan, 1.0)])
    assert expected.stages["reference"] == forecast(plan, WORK, []).stages["reference"]


def test_a_build_corrects_the_estimates_of_other_plans(plan):
    """A processor that is twice as slow is so for every model."""
    expected = forecast(other(plan), WORK, [built(plan, 2.0, gates=30.0, reference=10.0)])
    graph, spec = expected.graphs[plan.graphs[0].name], other(plan).graphs[0]
    assert not graph.recorded
    assert graph.seconds == pytest.approx(2 * other(plan).compile_seconds(spec))
    plain = forecast(other(plan), WORK, [])
    assert expected.stages["gates"] == pytest.approx(3 * plain.stages["gates"])
    assert expected.stages["reference"] == pytest.approx(0.5 * plain.stages["reference"])


def test_records_of_other_constants_correct_nothing(plan):
    """Their estimates were others: what a graph itself took still counts."""
    older = built(plan, 2.0, gates=30.0).model_copy(update={"estimates": ESTIMATES + 1})
    expected, plain = forecast(other(plan), WORK, [older]), forecast(other(plan), WORK, [])
    assert expected.graphs == plain.graphs
    assert expected.stages == plain.stages
    assert forecast(plan, WORK, [older]).graphs[plan.graphs[0].name].recorded


def test_other_gates_are_another_plan(plan):
    expected = forecast(plan, Work(99, 32), [built(plan, 1.0, gates=30.0)])
    assert expected.stages["gates"] == pytest.approx(3 * forecast(plan, Work(99, 32), []).stages["gates"])
    assert "gates" not in forecast(plan, Work(0), []).stages


def test_makespan_is_never_above_four_thirds_of_the_best_nor_below_it():
    """Graham's bound, with lower bounds of the optimum: the mean load and the longest job."""
    chooser = random.Random(0)
    for _ in range(200):
        jobs = [chooser.uniform(1, 20) for _ in range(chooser.randint(1, 30))]
        workers = chooser.randint(1, 8)
        bound = max(sum(jobs) / workers, max(jobs))
        longest_two = sorted(jobs)[-workers - 1 : len(jobs) - workers + 1] if len(jobs) > workers else []
        bound = max(bound, sum(longest_two) if len(longest_two) == 2 else 0)
        assert bound - 1e-9 <= makespan(jobs, workers) <= 4 / 3 * bound + max(jobs) / 3
    assert makespan([5, 4, 3, 3, 3], 2) == 10
    assert makespan([], 3) == 0


def test_cluster_states_time_hours_and_cost(plan):
    expected = forecast(plan, WORK, [])
    one, *_, last = cluster(expected, 3, price=2.0)
    assert [of.machines for of in cluster(expected, 3, None)] == [1, 2, 3]
    assert one.efficiency == pytest.approx(1)
    assert one.cost == pytest.approx(2 * one.seconds / 3600)
    assert last.machine_hours == pytest.approx(3 * last.seconds / 3600)
    assert cluster(expected, 3, None)[0].cost is None


def test_history_keeps_builds_of_this_machine(plan, tmp_path):
    history = History(tmp_path)
    assert history.builds() == []
    first, second = built(plan, 1.0), built(plan, 2.0)
    history.add(first)
    history.add(second.model_copy(update={"machine": "another"}))
    history.add(second)
    (history.folder / "00000000000000-x.json").write_text("{")
    assert history.builds() == [second, first]  # the newest first


def test_history_removes_the_oldest(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plan.history.KEPT", 2)
    for slower in (1.0, 2.0, 3.0):
        History(tmp_path).add(built(plan, slower))
    assert History(tmp_path).builds() == [built(plan, 3.0), built(plan, 2.0)]


def test_machine_names_processor_and_cores(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A CPU\ncpu family : 6\nmodel : 85\nstepping : 4\n")
    assert machine(tmp_path / "cpuinfo").startswith("A CPU (6/85/4), ")
    assert machine(tmp_path / "missing").startswith("unknown processor")
