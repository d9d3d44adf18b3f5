"""Gates in parts, each on an engine of its own, against gates in one pass."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from pipeline.cache.local import Cache
from pipeline.validate.gates import parts as gate_parts
from pipeline.validate.gates.answers import ScoredSequence, Sequences
from pipeline.validate.gates.parts import Elsewhere, GoldensPart, groups
from pipeline.validate.gates.run import run_gates
from pipeline.validate.run import make_report
from support import planted
from support.reports import inputs_of, recipe_of


def apart(work, recipe, ran, fault=None):
    """Run each part with inputs of its own, after sending it as bytes; goldens are shared."""

    def run(parts):
        results = []
        for part in map(pickle.loads, map(pickle.dumps, parts)):
            ran.append(part.name)
            inputs = inputs_of(work / "node", recipe, fault)
            results.append(part.run(replace(inputs, cache=Cache(work / "cache", "goldens"))))
        return pickle.loads(pickle.dumps(results))

    return Elsewhere(run, lambda: 3)


def compared(gates):
    """What two runs of the gates must have in common."""
    report = make_report(gates, {}).model_dump()
    return {name: value for name, value in report.items() if name not in ("speed", "provenance")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sampling", [pytest.param(("greedy",), marks=pytest.mark.slow), ("greedy", "stochastic")])
def test_parts_give_what_one_pass_gives(tmp_path, monkeypatch, sampling):
    """Every number of the report but times; greedy with two buckets."""
    monkeypatch.setattr(gate_parts, "CHUNK_TOKENS", 1)
    recipe, ran = recipe_of("qwen3", 0, "float32", sampling), []
    if len(sampling) == 2:
        shapes = recipe.shapes.model_copy(update={"batch": (2,), "kv": (48,)})
        recipe = recipe.model_copy(update={"shapes": shapes})
    expected = run_gates(inputs_of(tmp_path / "one", recipe))
    found = run_gates(inputs_of(tmp_path, recipe), apart(tmp_path, recipe, ran))
    assert compared(found) == compared(expected)
    goldens = {model: of.counts for model, of in found.references.items()}
    assert goldens == {model: of.counts for model, of in expected.references.items()}
    kinds = {name.partition("-")[0] for name in ran}
    assert kinds == {"answers", "reference", "scores", "edges"} | ({"draws"} if len(sampling) == 2 else set())
    assert len(ran) == len(set(ran))


def test_findings_of_parts_are_those_of_one_pass(tmp_path):
    """A fault in the graphs of the nodes' engines is found there; differences overwrite no caches of other parts."""
    recipe, fault = recipe_of("llama", 1, "float32"), planted.swapped_key_heads
    expected = run_gates(inputs_of(tmp_path / "one", recipe, fault))
    found = run_gates(inputs_of(tmp_path, recipe, fault), apart(tmp_path, recipe, [], fault))
    assert not found.passed
    assert found.findings == expected.findings


def sequences_of(lengths) -> Sequences:
    named = [ScoredSequence(f"s{n}", "chat", [0] * length, 1) for n, length in enumerate(lengths)]
    return Sequences(tuple(named[:-1]), tuple(named[-1:]))


def test_groups_have_all_sequences_once_and_about_equal_tokens():
    sequences = sequences_of([300, 200, 100, 900, 500, 700, 300])
    found = list(groups(sequences, 3))
    names = [sequence.name for group in found for sequence in group.all]
    assert sorted(names) == sorted(sequence.name for sequence in sequences.all)
    assert [GoldensPart(group, 0).share for group in found] == [1000, 1000, 1000]
    assert [len(group.probes) for group in found].count(1) == 1


@pytest.mark.parametrize(("lengths", "most", "count"), [([100, 100], 8, 1), ([3000], 8, 1), ([300] * 4, 2, 2)])
def test_groups_are_few_if_tokens_are_few(lengths, most, count):
    assert len(list(groups(sequences_of(lengths), most))) == count
