"""What graphs of the StableHLO frontend cost, counted on their HLO: weights, sampling, memory (`make test-hlo`)."""

from dataclasses import replace

import pytest
import torch

from pipeline.backends.neuron import costs, module
from pipeline.graphs.packing import InOutPacking
from pipeline.graphs.spec import GraphSpec
from pipeline.models.rank_slices import local_heads
from pipeline.plan.estimates import MIB, scratch_bytes, weight_bytes
from support.neuron_graphs import LENGTH, OVER_STATES, arguments_of, make, phases, sums, weightless
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
    verify = next(one for one in phases(4) if one.phase == "verify")
    for spec in (GraphSpec("decode", 4, 1, LENGTH, sampling="stochastic"), verify):
        arguments = arguments_of(spec, pair.shape)
        pair.state = empty_state(pair.shape)
        for one, other in zip(pair.step(spec, **arguments), graphs.step(spec, **arguments), strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=lambda m, s=spec: f"{s.name}: {m}")
        found = costs.costs(graphs.trace(spec).program.hlo)
        assert found.operators["custom-call"] > 1
        assert all(shape[-1] <= 16 for kind, shape in found.sent if kind == "all-gather")  # of 61 ids


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


def test_attention_of_a_prompt_is_half_of_the_square(backend):
    """A block of queries reads the keys up to its own end. One layer's products: those of two less those of one."""
    flops = []
    for layers in (1, 2):
        graphs, pair = weightless("llama-70b-spec", layers, 64)
        spec = next(one for one in graphs if one.phase == "prefill" and one.tokens == one.kv == 12288)
        flops.append(sum(costs.costs(backend.trace(spec, pair).program.hlo).dot_flops.values()))
    linear = square = 0
    for model in (pair.target, pair.draft):
        heads = local_heads(model, 64)
        features = (2 * heads + 2) * model.head_dim + 3 * model.intermediate // 64
        linear += 2 * spec.tokens * model.hidden * features
        square += 2 * 2 * spec.tokens * spec.kv * heads * model.head_dim
    attention = flops[1] - flops[0] - linear
    assert 0.5 * square <= attention <= 0.6 * square


def test_draft_of_llama_70b_is_read_by_shares(backend):
    """Six passes of the draft read under 2 GB of a rank's weights and caches; replicated, they read 14.8 GB."""
    graphs, pair = weightless("llama-70b-spec", None, 64)
    assert max(spec.draft_tokens for spec in graphs) == 6
    pair = replace(pair, models=replace(pair.models, target=replace(pair.target, layers=1)))
    read = [
        costs.costs(backend.trace(GraphSpec("speculate", 1, k + 1, 12800, k), pair).program.hlo).read_bytes
        for k in (1, 2)
    ]
    one_pass = read[1] - read[0]
    caches = 2 * 2 * pair.draft.layers * 12800 * pair.draft.head_dim  # keys and values of one KV head, bfloat16
    assert one_pass == pytest.approx(weight_bytes(pair.models, "draft", InOutPacking()) + caches, rel=0.02)
    assert 6 * one_pass < 2e9


@pytest.mark.parametrize(("recipe", "tp"), [("qwen3-30b-a3b-spec", 8), ("gpt-oss-20b-spec", 4)])
def test_intermediates_of_experts_are_those_of_the_plan(backend, recipe, tp):
    """A prefill of 8192 tokens held each expert's output for each token, 16 GiB; drafts gather more than they took."""
    graphs, pair = weightless(recipe, 2, tp)
    experts = pair.target.expert_layers[0]
    for spec in (one for one in graphs if one.name.startswith(("prefill-b4-t2048", "speculate-b4", "decode-b4"))):
        found = costs.costs(backend.trace(spec, pair).program.hlo)
        assert found.peak_bytes <= scratch_bytes(pair, spec, fused=False), spec.name
        inner = 2 * experts.count * 8192 * experts.intermediate // tp
        assert found.largest.bytes <= max(inner, 256 * MIB), (spec.name, found.largest)


@pytest.mark.parametrize("kv", [8, LENGTH])
@pytest.mark.parametrize(("family", "tp"), [("llama", 1), ("llama-bias", 2), ("qwen3", 4), ("eagle3", 2)])
def test_prompts_are_divided_and_written_in_blocks(backend, family, tp, kv):
    """Tokens of the residual stream are divided among ranks; no scatter writes more than a row."""
    shape = make(family, 4, tp, replicated=family == "eagle3").shape
    spec = GraphSpec("prefill", 4, 8, kv)
    found = costs.costs(backend.trace(spec, shape).program.hlo)
    assert found.scattered_rows <= 1
    caches = 2 * (shape.target.layers + shape.draft.layers)
    state = 0 if shape.draft.eagle3 else 1
    assert found.operators["dynamic-update-slice"] >= 4 * (caches + state)
    assert "all-reduce" not in found.collective_bytes
    if tp == 1:
        assert not found.sent
        return
    assert found.operators["reduce-scatter"] == sums(spec, shape)
    assert ("all-gather", (4, 8 // tp, shape.target.hidden)) in found.sent
    assert ("reduce-scatter", (4, 8, shape.target.hidden)) in found.sent
    whole = 4 * 8 * shape.target.hidden * 4
    assert found.collective_bytes["reduce-scatter"] == sums(spec, shape) * whole
    odd = costs.costs(backend.trace(GraphSpec("prefill", 4, 9, 9 if kv == 8 else kv), shape).program.hlo)
    assert odd.operators["all-reduce"] == sums(spec, shape)
    assert "reduce-scatter" not in odd.collective_bytes


@pytest.mark.parametrize(("family", "tp"), [("qwen3", 1), ("qwen3", 2), ("eagle3", 1), ("dflash", 1), ("dspark", 1)])
def test_chunks_at_the_end_of_a_cache_equal_eager(backend, graphs_of, family, tp):
    """A block that would pass the cache's end begins earlier; a row without a prompt keeps what it has."""
    pair = make(family, 4, replicated=family != "qwen3", reduced=family in OVER_STATES)
    graphs, generator = graphs_of(backend, pair, tp), torch.Generator().manual_seed(4)
    spec = GraphSpec("prefill", 4, 8, LENGTH)
    arguments = arguments_of(spec, pair.shape) | {"position": [36, 31, 35, 20], "lengths": [3, 8, 0, 5]}
    filled = {
        name: torch.randn(one.shape, generator=generator) if one.is_floating_point() else torch.full_like(one, 7)
        for name, one in empty_state(pair.shape).items()
    }
    pair.state = {name: one.clone() for name, one in filled.items()}
    heads = pair.shape.target.kv_heads // tp
    graphs.state = [
        {name: one[:, rank * heads : (rank + 1) * heads].contiguous() if one.dim() == 4 else one.clone()
         for name, one in filled.items()}
        for rank in range(tp)
    ]  # fmt: skip
    (wanted,), (got,) = pair.step(spec, **arguments), graphs.step(spec, **arguments)
    assert torch.equal(got, wanted)
    for name, one in pair.state.items():
        parts = [state[name] for state in graphs.state]
        together = torch.cat(parts, dim=1)[:, :, :-1] if one.dim() == 4 else parts[0]
        expected = one[:, :, :-1] if one.dim() == 4 else one
        torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
