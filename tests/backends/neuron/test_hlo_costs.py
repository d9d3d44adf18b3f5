"""What graphs of the StableHLO frontend cost, counted on their HLO: weights, sampling, memory (`make test-hlo`)."""

import pytest
import torch

from pipeline.backends.neuron import costs, module
from pipeline.graphs.spec import GraphSpec
from pipeline.plan.estimates import MIB, scratch_bytes
from support.neuron_graphs import LENGTH, OVER_STATES, arguments_of, make, phases, weightless
from support.pairs import empty_state

pytestmark = pytest.mark.hlo


@pytest.mark.parametrize(("family", "tp"), [*((family, 1) for family in OVER_STATES), ("qwen2-moe", 2)])
def test_weights_of_heads_and_experts_are_multiplied_as_they_are_stored(backend, family, tp):
    """No weight is transposed; but for a tied embedding, each is contracted on its first axis."""
    shape = make(family, 4, tp, replicated=False, reduced=family in OVER_STATES).shape
    for spec in (GraphSpec("prefill", 4, 8, 8), GraphSpec("speculate", 4, 3, LENGTH, 2)):
        found = costs.costs(backend.trace(spec, shape).program.hlo)
        assert found.transposes == 0, spec.name
        assert found.contracted.get(1, 0) == 1 + (spec.draft_tokens if shape.draft.tied else 0), spec.name


@pytest.mark.parametrize("tp", [1, 4])
def test_sampling_in_groups_equals_eager(backend, graphs_of, monkeypatch, tp):
    """Of 61 logits on one rank, and of 16 candidates of each of four."""
    monkeypatch.setattr(module, "WIDEST_TOP", 8)
    pair = make("qwen3", 4, replicated=False)
    graphs = graphs_of(backend, pair, tp)
    for spec in (
        GraphSpec("decode", 4, 1, LENGTH, sampling="stochastic"),
        *(s for s in phases(4) if s.phase == "verify"),
    ):
        arguments = arguments_of(spec, pair.shape)
        pair.state = empty_state(pair.shape)
        for one, other in zip(pair.step(spec, **arguments), graphs.step(spec, **arguments), strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=lambda m, s=spec: f"{s.name}: {m}")
        calls = [o.opcode for c in graphs.trace(spec).program.hlo.computations for o in c.instructions]
        assert calls.count("custom-call") > 1


def test_sampling_of_llama_70b_sends_candidates_alone(backend):
    """64 ranks have 256 candidates each: 16,384 in one row are more than the compiler's top-k takes for sure."""
    graphs, pair = weightless("llama-70b-spec", 1, 64)
    for spec in (s for s in graphs if s.sampling == "stochastic"):
        found = costs.costs(backend.trace(spec, pair).program.hlo)
        assert 0 < found.widest_top <= module.WIDEST_TOP, spec.name
        widths = {shape[-1] for _, shape in found.sent} - {pair.target.hidden, pair.draft.hidden}
        assert widths == {1, pair.candidates}, spec.name
        assert "reduce-window" not in found.operators


def test_intermediates_of_llama_70b_are_those_of_the_plan(backend):
    """A prefill of 12,288 tokens held [T, S] scores in float32, 19.3 GB in a draft of 32 heads on one rank."""
    graphs, pair = weightless("llama-70b-spec", 2, 64)
    for spec in graphs:
        found = costs.costs(backend.trace(spec, pair).program.hlo)
        assert found.peak_bytes <= scratch_bytes(pair, spec, fused=False), spec.name
        if spec.phase != "score":  # whose logits of all positions only the gates read
            assert found.largest.bytes <= 256 * MIB, (spec.name, found.largest)
