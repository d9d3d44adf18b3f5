"""What a compiled graph holds at its peak is what the plan says: allocations counted by torch's profiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.config import Layer
from pipeline.models.families import config_of
from pipeline.models.rope_types import Rope
from pipeline.plan.estimates import MIB, scratch_bytes
from pipeline.recipe.backend_settings import InductorSettings
from support.graphs import compile_graph
from support.pairs import make_pair

BACKEND = InductorBackend(InductorSettings())
SPECS = (
    GraphSpec("prefill", 4, 256, 512, 0, "stochastic"),
    GraphSpec("speculate", 4, 4, 512, 3, "stochastic"),
    GraphSpec("decode", 4, 1, 512),
    GraphSpec("score", 4, 64, 512, model="target"),
)


def pair_of(dtype: str) -> PairSpec:
    """Two layers with the proportions of SmolLM2-135M, and a draft of one."""
    target = replace(
        make_pair().shape.target, family="llama", layers=2, hidden=576, intermediate=1536, heads=9, kv_heads=3,
        head_dim=64, vocab=8192, qk_norm=None, kinds=(Layer(Rope(1e4, 64)),),
    )  # fmt: skip
    models = replace(make_pair().shape.models, target=target, draft=replace(target, layers=1), target_dtype=dtype,
                     draft_dtype=dtype)  # fmt: skip
    return PairSpec(models, rows=4, length=512, candidates=64)


def peak_bytes(graph: LoadedGraph, inputs: list[torch.Tensor]) -> int:
    """Return the most that one run holds at a time."""
    graph.run(inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        graph.run(inputs)
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def recurrent_pair(net: dict[str, int]) -> PairSpec:
    """A layer with a gated delta net and one with attention, as Qwen3.5 has."""
    pair = pair_of("bfloat16")
    fields = {
        "model_type": "qwen3_5_text", "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
        "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    target = config_of(fields | net, "target")
    return replace(pair, models=replace(pair.models, target=target, draft=target), replayed=6)


NETS = [(4, 8, 64, 64), (2, 4, 128, 128)]
"""Key heads, value heads, and their sizes."""


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=lambda spec: spec.name)
def test_plan_states_what_a_recurrent_graph_holds(spec, net, tmp_path: Path):
    """Was: the recurrence was not counted, half of the peak."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    measure(recurrent_pair({f"linear_{name}": size for name, size in zip(names, net, strict=True)}), spec, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_plan_states_what_a_graph_holds(spec, dtype, tmp_path: Path):
    measure(pair_of(dtype), spec, tmp_path)


def measure(pair: PairSpec, spec: GraphSpec, tmp_path: Path) -> None:
    """Compare the plan of a graph with what one run of it holds."""
    compile_graph(BACKEND, BACKEND.trace(spec, pair), tmp_path)
    inputs = [
        torch.ones(tensor.shape, dtype=torch_dtype(tensor.dtype))
        for tensor in signature(spec, pair, BACKEND.packing).inputs
    ]
    measured = peak_bytes(LoadedGraph(tmp_path / BACKEND.graph_file, "cpu"), inputs)
    assert scratch_bytes(pair, spec, fused=True) == pytest.approx(measured, rel=0.25, abs=MIB // 8)
