"""Proposals for a recipe: against brute force over all buckets and divisions of the budget."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.measure.buckets import padded
from pipeline.measure.traffic import Traffic, read_traffic
from pipeline.measure.traffic_buckets import graphs_per_bucket, position_cost, propose, room_of, step_lengths
from pipeline.plan.lock import pair_configs, read
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import load

ROOT = Path(__file__).parents[2]


def plan_of(name: str, **shapes: tuple[int, ...]) -> Plan:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load(path)
    configs = pair_configs(recipe, read(path.with_suffix(".lock")), "lock")
    return make_plan(recipe.model_copy(update={"shapes": recipe.shapes.model_copy(update=shapes)}), *configs)


NEURON = plan_of("llama-8b-spec", prefill=(64, 256), kv=(256, 768))


def traffic_of(seed: int) -> Traffic:
    """Requests; in every second case with short answers, so that prefill buckets are worth more."""
    rng = random.Random(seed)
    longest = 500 if seed % 2 else 20
    lengths = [(rng.choice([rng.randint(1, 90), rng.randint(1, 255)]), rng.randint(0, longest)) for _ in range(25)]
    return Traffic(Counter(lengths))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [24, 36, 50])
def test_propose_is_the_best_of_all_buckets_and_divisions(seed, budget):
    traffic, (prefill_graphs, kv_graphs) = traffic_of(seed), graphs_per_bucket(NEURON)
    prompts, steps, cost = traffic.prompts, step_lengths(NEURON, traffic), position_cost(NEURON)
    prefill = [[*of, 256] for count in range(8) for of in combinations(range(32, 256, 32), count)]
    kv = [[*of, 768] for count in range(6) for of in combinations(range(128, 768, 128), count)]
    of_prefill = [(len(of) * prefill_graphs, padded(prompts, of)) for of in prefill]
    of_kv = [(len(of) * kv_graphs, cost * padded(steps, of)) for of in kv]
    best = min(one + other for graphs, one in of_prefill for more, other in of_kv if graphs + more <= budget)
    found = propose(NEURON, traffic, budget).proposed
    total = padded(prompts, found["prefill"].buckets) + cost * padded(steps, found["kv"].buckets)
    assert total == pytest.approx(best, rel=1e-12)
    assert found["prefill"].graphs + found["kv"].graphs <= budget


def test_graphs_of_a_proposal_are_those_of_its_plan():
    found = propose(NEURON, traffic_of(0), 60).proposed
    again = plan_of("llama-8b-spec", prefill=found["prefill"].buckets, kv=found["kv"].buckets)
    assert found["prefill"].graphs + found["kv"].graphs == len(again.graphs)


def test_step_lengths_are_those_that_steps_need():
    """By hand, K=4: an answer's first token is the prefill's; a step after n tokens needs n + 4 positions."""
    requests = {(10, 0): 5, (10, 1): 5, (10, 3): 2, (11, 2): 1, (700, 67): 1}
    steps = step_lengths(NEURON, Traffic(requests))
    assert steps[15] == steps[14 + 2] - 1 == 2
    assert sum(steps.values()) == 2 * 2 + 1 + 66
    assert max(steps) == 768


def test_step_lengths_have_room_for_drafts_up_to_the_end_of_the_cache():
    steps = step_lengths(NEURON, Traffic({(760, 7): 1}))  # steps after 761 to 766 tokens
    assert steps == {765: 1, 766: 1, 767: 1, 768: 3}


def test_propose_keeps_one_kv_bucket_on_a_cpu():
    """Attention on a CPU reads only the keys of a request, whatever the bucket."""
    plan = plan_of("smollm2-135m-spec", kv=(512, 1024))
    proposal = propose(plan, traffic_of(1), 60)
    assert proposal.position_cost == 0
    assert proposal.proposed["kv"].buckets == (1024,)
    assert proposal.proposed["kv"].padding == 1.0


def test_propose_keeps_kv_buckets_without_lengths_of_answers():
    prompts = Traffic({(20, 0): 9, (100, 0): 1}, has_answers=False)
    proposal = propose(NEURON, prompts, 29)
    assert proposal.proposed["kv"].buckets == (256, 768)
    assert proposal.proposed["kv"].padding is None
    assert proposal.proposed["prefill"].buckets == (32, 128, 256)


def test_propose_raises_the_largest_prefill_bucket_and_never_lowers_it():
    """It limits the prompts that an artifact accepts."""
    short, long = Traffic({(20, 5): 1}), Traffic({(20, 5): 1, (700, 5): 3, (260, 2): 1})
    assert propose(NEURON, short, 30).proposed["prefill"].buckets[-1] == 256
    proposal = propose(NEURON, long, 30)
    assert proposal.proposed["prefill"].buckets[-1] == 704
    assert proposal.rejected == 4
    end = Traffic({(766, 1): 1})
    assert propose(NEURON, end, 30).proposed["prefill"].buckets[-1] == 767


def test_propose_with_too_few_graphs():
    with pytest.raises(InputError, match=r"found 12; one bucket of each kind needs 13 graphs"):
        propose(NEURON, traffic_of(0), 12)
    assert propose(NEURON, traffic_of(0), 13).proposed["kv"].buckets == (768,)


def test_propose_never_pads_more_with_more_graphs_or_than_the_recipe():
    traffic, cost = traffic_of(3), position_cost(NEURON)

    def tokens(prefill: tuple[int, ...], kv: tuple[int, ...]) -> float:
        return padded(traffic.prompts, prefill) + cost * padded(step_lengths(NEURON, traffic), kv)

    found = [propose(NEURON, traffic, budget).proposed for budget in range(13, 80, 4)]
    costs = [tokens(of["prefill"].buckets, of["kv"].buckets) for of in found]
    assert costs == sorted(costs, reverse=True)
    now = NEURON.recipe.shapes
    assert tokens(*(of.buckets for of in propose(NEURON, traffic, len(NEURON.graphs)).proposed.values())) <= tokens(
        now.prefill, now.kv
    )


def test_requests_of_two_histograms_are_those_of_their_prompts():
    """They are combined to all pairs of a prompt and an answer."""
    traffic = Traffic({(20, 5): 6, (300, 5): 4, (20, 9): 9, (300, 9): 6}, copies=5)
    proposal = propose(NEURON, traffic, 30)
    assert (proposal.requests, proposal.rejected) == (5, 2)


def test_room_is_that_of_the_model_with_fewer_positions():
    draft = replace(NEURON.pair.models.draft, max_position=1000)
    pair = replace(NEURON.pair, models=replace(NEURON.pair.models, draft=draft))
    assert room_of(replace(NEURON, pair=pair)).limit == 1000
    assert room_of(NEURON).tokens == 767


def test_example_of_traffic_gets_less_padding_from_twice_the_graphs():
    plan = plan_of("llama-8b-spec")
    traffic = read_traffic(ROOT / "examples" / "traffic.csv", room_of(plan))
    proposal = propose(plan, traffic, 52)
    assert proposal.requests == 2400
    for kind, now in proposal.now.items():
        assert proposal.proposed[kind].padding < 0.7 * now.padding
