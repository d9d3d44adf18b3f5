"""Graphs as programs of subgraphs: each equals its phase, graphs share them, and layers add calls, no subgraphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.backends.base import make_backend
from pipeline.backends.inductor.backend import CONTAINER
from pipeline.backends.inductor.driver import source
from pipeline.backends.inductor.program import Program, program_of
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.backends.inductor.subgraphs import SubgraphTracer, skeleton
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import GraphModule
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.families import config_of
from pipeline.models.parallel import Attend, Seams
from pipeline.recipe.backend_settings import InductorSettings
from support.neuron_graphs import OVER_STATES
from support.pairs import SMALL, make_pair

BACKEND = make_backend(InductorSettings())
HEAD = SMALL | {
    "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 40,
    "shares_embedding": True, "tie_word_embeddings": False,
}  # fmt: skip
SPECS = [
    GraphSpec("prefill", 2, 6, 40),
    GraphSpec("prefill", 2, 6, 40, sampling="stochastic"),
    GraphSpec("decode", 2, 1, 40),
    GraphSpec("decode", 2, 1, 40, sampling="stochastic"),
    GraphSpec("speculate", 2, 4, 40, 3),
    GraphSpec("speculate", 2, 4, 40, 3, "stochastic"),
    GraphSpec("score", 2, 5, 40, model="target"),
    GraphSpec("score", 2, 5, 40, model="draft"),
]


def pair_of(kind: str, layers: int = 3) -> PairSpec:
    pair = make_pair(rows=3, length=40).shape
    models = replace(pair.models, target=replace(pair.target, layers=layers), tp=2 if kind == "ranks" else 1)
    if kind in OVER_STATES:
        models = replace(models, draft=config_of(HEAD | OVER_STATES[kind], "test"))
    return replace(pair, models=models, lookup=kind == "lookup")


def random_inputs(spec: GraphSpec, pair: PairSpec) -> list[Tensor]:
    """Inputs that a graph can get: rows at different positions, one of them inactive."""
    whole = {
        "lengths": [4, 0], "slots": [2, 0], "position": [7, 36], "active": [True, False], "top_k": [5, 0],
        "temperature": [0.8, 0.0], "top_p": [0.9, 1.0], "copied": [[-1, 3, 4], [-1, -1, -1]],
    }  # fmt: skip
    inputs = []
    for tensor in signature(spec, pair, BACKEND.packing).inputs:
        dtype = torch_dtype(tensor.dtype)
        if tensor.name in whole:
            inputs.append(torch.tensor(whole[tensor.name], dtype=dtype))
        elif tensor.name == "seed":
            inputs.append(torch.randint(-(2**31), 2**31 - 1, tensor.shape, dtype=dtype))
        elif tensor.name in ("tokens", "last_token", "draft/tail"):
            inputs.append(torch.randint(0, pair.target.vocab, tensor.shape, dtype=dtype))
        elif dtype.is_floating_point:
            inputs.append(torch.randn(tensor.shape) / 3)
        else:
            inputs.append(torch.zeros(tensor.shape, dtype=dtype))
    return inputs


def run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run the calls of a program with torch."""
    values = dict(enumerate(inputs))
    for call in program.calls:
        subgraph = program.subgraphs[call.subgraph]
        given = [values[number] for number in call.inputs]
        assert all(value.is_contiguous() for value in given)
        assert [tuple(value.shape) for value in given] == [meta.shape for meta in subgraph.inputs]
        values.update(zip(call.outputs, subgraph.module(*given), strict=True))
    return [values[number] for number in program.outputs]


def program(spec: GraphSpec, pair: PairSpec) -> Program:
    traced: Program = BACKEND.trace(spec, pair).program
    return traced


PARALLEL = [
    (SPECS[4], "p_eagle"),
    (SPECS[4], "dflash"),
    (SPECS[4], "dspark"),
    *(pytest.param(spec, "dflash", marks=pytest.mark.slow) for spec in (SPECS[0], SPECS[-1])),
]
CASES = [(spec, "draft model") for spec in SPECS[1::2]] + [(spec, "eagle3") for spec in SPECS[:-2:2] + SPECS[-1:]]


@pytest.mark.parametrize(
    ("spec", "kind"), [*CASES, *PARALLEL, (SPECS[5], "lookup")], ids=lambda value: getattr(value, "name", value)
)
def test_program_equals_its_phase(spec, kind):
    """Results and state, bit by bit: the order of calls keeps what a phase reads before it writes."""
    pair = pair_of(kind)
    torch.manual_seed(0)
    inputs = random_inputs(spec, pair)
    mine, theirs = ([tensor.clone() for tensor in inputs] for _ in range(2))
    with torch.no_grad():
        expected = GraphModule(spec, pair, signature(spec, pair, BACKEND.packing), BACKEND.seams)(theirs)
        results = run(program(spec, pair), mine)
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(
    ("number", "kind"), [(0, "eagle3"), (2, "draft model"), (4, "draft model"), (6, "eagle3"), (2, "ranks")]
)
def test_layers_add_calls_and_no_subgraphs(number, kind):
    few, many = (program(SPECS[number], pair_of(kind, layers)) for layers in (8, 11))
    assert {call.subgraph for call in few.calls} == {call.subgraph for call in many.calls}
    assert len(many.calls) - len(few.calls) == 3
    subgraphs = [call.subgraph for call in many.calls]
    assert max(map(subgraphs.count, subgraphs)) >= 11


def test_sampling_and_greedy_share_the_layers_and_what_is_before_them():
    greedy, sampling = (
        {call.subgraph for call in program(GraphSpec("decode", 2, 1, 40, sampling=how), pair_of("lookup")).calls}
        for how in ("greedy", "stochastic")
    )
    assert len(greedy) == len(sampling) == 3
    assert len(greedy & sampling) == 2


def test_steps_of_the_draft_are_one_subgraph_for_any_number_of_them():
    """Between two steps nothing is left to run: what a later step needs is computed before the first one."""
    two, five = (program(GraphSpec("speculate", 2, k + 1, 40, k), pair_of("eagle3")) for k in (2, 5))
    counts = [[call.subgraph for call in p.calls].count(p.calls[1].subgraph) for p in (two, five)]
    assert counts == [2, 5]
    assert {two.calls[1].subgraph, two.calls[2].subgraph} == {five.calls[1].subgraph, five.calls[2].subgraph}
    assert len(five.calls) - len(two.calls) == 2 * 3


def test_names_are_digests_of_what_a_subgraph_does():
    spec, pair = SPECS[2], pair_of("draft model")
    first = BACKEND.trace(spec, pair)
    assert first.subgraphs[0].name == CONTAINER
    again = BACKEND.trace(spec, pair)
    assert [subgraph.name for subgraph in first.subgraphs] == [subgraph.name for subgraph in again.subgraphs]
    assert first.ir == again.ir
    other = replace(pair, models=replace(pair.models, target=replace(pair.target, norm_eps=1e-3)))
    changed = {subgraph.name for subgraph in BACKEND.trace(spec, other).subgraphs} - {
        subgraph.name for subgraph in first.subgraphs
    }
    assert len(changed) >= 2  # the layer, and the norm after the last one
    assert BACKEND.trace(spec, other).ir != first.ir


def test_driver_frees_values_after_their_last_use_and_keeps_results():
    """Its tables, read as its loop reads them, are the calls of the program."""
    traced = program(SPECS[4], pair_of("eagle3"))
    text = source(traced)
    rows = re.findall(r"\{(p[0-9a-f]+), (\d+), (\d+), (\d+)\}", text)
    tables = {name: found.split(", ") for name, found in re.findall(r"uint32_t (\w+)\[\] = \{(.*)\};", text)}
    numbers, made, freed = iter(map(int, tables["numbers"])), traced.inputs, set()
    for call, (name, inputs, outputs, ended) in zip(traced.calls, rows, strict=True):
        taken = [next(numbers) for _ in range(int(inputs))]
        assert (name, taken) == (call.subgraph, list(call.inputs))
        assert not freed & set(taken)
        assert call.outputs == tuple(range(made, made + int(outputs)))
        made += int(outputs)
        freed |= {next(numbers) for _ in range(int(ended))}
    assert list(numbers) == []
    assert list(map(int, tables["returned"])) == list(traced.outputs)
    assert not freed & set(traced.outputs)
    used = {number for call in traced.calls for number in call.inputs}
    assert freed == used - set(range(traced.inputs)) - set(traced.outputs)


class Pass(NamedTuple):
    attend: Attend
    words: tuple[str, ...]


@dataclass(frozen=True)
class Holder:
    tensors: dict[str, Tensor]
    run: Pass
    nothing: None = None


def test_skeleton_takes_tensors_out_and_puts_others_back():
    one, two, three = (torch.full((2,), value) for value in (1, 2, 3))
    held = Holder({"a": one, "b": two}, Pass(Attend(three, 7, one), ("x", "y")))
    tensors: list[Tensor] = []
    rest = skeleton(held, tensors)
    assert [int(tensor[0]) for tensor in tensors] == [1, 2, 3, 1]
    other = rest.filled([tensor + 10 for tensor in tensors])
    assert (int(other.tensors["b"][0]), int(other.run.attend.last_BT[0]), other.run.attend.kv) == (12, 13, 7)
    assert other.run.words == ("x", "y")
    assert skeleton(replace(held, run=Pass(Attend(three, 8, one), ("x", "y"))), []).text != rest.text
    assert skeleton(Seams(), []).text != skeleton(BlockedSeams(), []).text
    assert "0x" not in rest.text + skeleton(BlockedSeams(), []).text  # no address of this process


class Stateful:
    """A phase that reads state, writes it in a marked call and outside of one, and reads it between."""

    def __init__(self, tracer: SubgraphTracer) -> None:
        self.seams = BlockedSeams(tracer)

    def __call__(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        state, x = tensors
        before = state + 0
        y = self.seams.once(add_to, state, x)
        between = state * 2
        state.mul_(x + 3)  # the sum is needed before the second call, though nothing reads what is written
        after = self.seams.once(add_to, state, y)
        return before, between, after, state + x


def add_to(state: Tensor, x: Tensor) -> Tensor:
    state.add_(x)
    return state * x


def test_reads_and_writes_of_state_keep_their_order():
    inputs = [torch.arange(3.0), torch.tensor([1.0, -2.0, 0.5])]
    tracer = SubgraphTracer(str)
    traced = program_of(Stateful(tracer), tracer, inputs, str)
    mine, theirs = ([tensor.clone() for tensor in inputs] for _ in range(2))
    plain = Stateful(tracer)
    plain.seams = BlockedSeams()
    results, expected = run(traced, mine), plain(theirs)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(mine[0], theirs[0])
    second = traced.calls[-2]
    assert 0 in second.inputs  # the state itself: a compiled subgraph may return a copy of what it wrote


@pytest.mark.slow
def test_subgraphs_do_not_copy_caches():
    """Generated code allocates no buffer of a cache's shape: state is written in place."""
    from pipeline.backends.inductor import subgraph_objects  # not at the top: it imports Inductor

    spec, pair = SPECS[4], pair_of("eagle3")
    cache = next(tensor.shape for tensor in signature(spec, pair, BACKEND.packing).state if tensor.name == "target/k.0")
    arrays = re.compile(r"(int_array_\d+)\[\] = \{" + ", ".join(f"{size}L" for size in cache) + r"\}")
    allocations = 0
    for subgraph in BACKEND.trace(spec, pair).subgraphs:
        if subgraph.name != CONTAINER:
            with BACKEND.inductor(subgraph.ir):
                source = subgraph_objects.source(subgraph.program, subgraph_objects.generated(subgraph.program))
            allocated = re.findall(r"aoti_torch_empty_strided\w*\((?:\d+, )?(int_array_\d+)", source)
            assert not set(arrays.findall(source)) & set(allocated)
            allocations += len(allocated)
    assert allocations > 10, "the generated code names its allocations differently; mend this test"
