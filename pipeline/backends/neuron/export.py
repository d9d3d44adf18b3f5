"""A phase traced by torch for the StableHLO frontend, with the operators that torch-mlir cannot lower cut out.

`make_fx` is the tracer beneath torch.export: the same operators, in a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import getitem

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pipeline.backends.neuron.module import NeuronSeams, in_rank_order, with_booleans
from pipeline.backends.neuron.operators import (
    OPERATORS,
    Cut,
    all_gather,
    all_reduce,
    dot,
    gather_tokens,
    product,
    put_block,
    read_block,
    scatter_tokens,
    top_k,
)
from pipeline.graphs.module import empty, run_phase
from pipeline.graphs.signature import Signature, TensorSpec
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.parallel import Block, State, Writes


class StableHloSeams(NeuronSeams):
    """The seams of Neuron with operators of our own for what torch-mlir cannot lower.

    In a graph that reads `prompts`, blocks of keys and values are written as they are, and ranks divide the tokens of
    the residual stream (sequence parallelism, Korthikanti et al. 2022): in `divided` passes.
    """

    def __init__(self, tp: int, group: Sequence[int] = (), *, prompts: bool = False, divided: bool = False) -> None:
        super().__init__(tp)
        self.group, self.prompts, self.divided = group, prompts, divided

    def of_pass(self, tokens: int) -> StableHloSeams:
        """Divide the tokens of prompts, where ranks have equal shares."""
        divided = self.prompts and self.tp > 1 and tokens % self.tp == 0
        return StableHloSeams(self.tp, self.group, prompts=self.prompts, divided=divided)

    def own_tokens(self, x_BTH: Tensor) -> Tensor:
        """Sum over ranks, in a divided pass by a reduce-scatter."""
        return scatter_tokens(x_BTH, self.tp) if self.divided else self.all_reduce(x_BTH)

    def all_tokens(self, x_BTH: Tensor) -> Tensor:
        """Gather the tokens of a divided pass; parts have the order of the group, as those of `own_tokens`."""
        return gather_tokens(x_BTH, self.tp) if self.divided else x_BTH

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:
        """Write blocks of prompts row by row, over what their padding covers; scatter anything else."""
        if not self.prompts or writes.block == "none":
            return super().write(state, name, new_BHTD, writes)
        rows_B, places_BT = writes.index[0].flatten().int(), writes.index[2][:, 0].int()
        for number, new_HTD in enumerate(new_BHTD):
            new_1HTD, row, places_T = new_HTD[None], rows_B[number], places_BT[number]
            if writes.block == "ring":
                state[name] = _with_block_around(state[name], new_1HTD, row, places_T)
            else:
                state[name] = _with_block(state[name], new_1HTD, row, places_T, writes.block)
        return state[name]

    def put_row(self, state: State, name: str, rows_B: Tensor, values: Tensor) -> None:
        """Write rows one by one where a graph reads prompts."""
        if not self.prompts:
            super().put_row(state, name, rows_B, values)
            return
        rows = rows_B.int()
        for number in range(len(rows)):
            row = rows[number]
            state[name] = put_block(state[name], values[number : number + 1], row, torch.zeros_like(row))

    def top_of_rows(self, scores_MN: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Use the compiler's custom call."""
        return top_k(scores_MN, count)

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Multiply by a weight [I, N] as it is stored."""
        return product(x_BTI, weight, wide=False)[..., :rows]

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Apply the LM head with a float32 result, without a float32 copy of its weights."""
        return product(x_BTI, weight, wide=True)[..., :rows]

    def tied_head(self, x_BTI: Tensor, embedding: Tensor, rows: int) -> Tensor:
        """Apply the embedding [N, I] as the LM head, as `head`."""
        return dot(x_BTI, embedding, wide=True)[..., :rows]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Multiply queries and keys, in float32."""
        return dot(q, k, wide=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return x if self.tp == 1 else all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks, in rank order."""
        return x if self.tp == 1 else in_rank_order(all_gather(x, self.tp), self.group)


def _with_block(cache: Tensor, new_1HTD: Tensor, row: Tensor, places_T: Tensor, block: Block) -> Tensor:
    """Return a cache [R, H, S, D] with the first tokens of a row, those that are not written to the scratch position.

    The other positions of the block keep what they have. A block that would pass the cache's end begins earlier.
    """
    length, tokens = cache.shape[2], new_1HTD.shape[2]
    count = (places_T < length - 1).sum(dtype=torch.int32)
    first = places_T[0]
    if block == "first":
        start = torch.zeros_like(first)
    else:
        start = first.clamp(max=length - tokens)
        before = torch.cat((torch.zeros_like(new_1HTD), new_1HTD), dim=2)
        new_1HTD = read_block(before, torch.zeros_like(row), tokens - (first - start), tokens)
    place_T = start + torch.arange(tokens, dtype=torch.int32, device=cache.device)
    is_new_T1 = ((place_T >= first) & (place_T < first + count))[:, None]
    return put_block(cache, torch.where(is_new_T1, new_1HTD, read_block(cache, row, start, tokens)), row, start)


def _with_block_around(cache: Tensor, new_1HTD: Tensor, row: Tensor, places_T: Tensor) -> Tensor:
    """Return a cache of rings, as `_with_block`: with a block up to the last slot, and its rest from the first one."""
    slots, tokens = cache.shape[2] - 1, new_1HTD.shape[2]
    index_T = torch.arange(tokens, dtype=torch.int32, device=cache.device)
    before = slots - places_T[0]
    rest = (places_T < slots).sum(dtype=torch.int32) - before
    cache = _with_block(cache, new_1HTD, row, torch.where(index_T < before, places_T, slots), "any")
    both = torch.cat((new_1HTD, torch.zeros_like(new_1HTD)), dim=2)
    moved = read_block(both, torch.zeros_like(row), before.clamp(max=tokens), tokens)
    return _with_block(cache, moved, row, torch.where(index_T < rest, index_T, slots), "first")


@dataclass
class Exported:
    """A traced graph whose operators of our own are cut out: inputs, then results of the cuts -> outputs, operands."""

    module: torch.fx.GraphModule
    inputs: list[TensorSpec]
    replaced: list[str]
    cuts: list[Cut] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)


def export(spec: GraphSpec, pair: PairSpec, io: Signature, group: Sequence[int]) -> Exported:
    """Trace a phase on tensors without contents, and cut our own operators out."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table  # of an extra, only while tracing

    inputs, run = parameters(io), phase(spec, pair, io, group)
    with torch.no_grad(), FakeTensorMode():
        module = make_fx(run, get_decomposition_table() | DECOMPOSITIONS)(*empty(inputs))
    exported = Exported(module, list(inputs), _keep_replaced(module.graph, io))
    _cut(exported)
    return exported


def phase(
    spec: GraphSpec, pair: PairSpec, io: Signature, group: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """Return a phase as a function of `parameters`: its results, then all state after it."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = with_booleans({one.name: tensor for one, tensor in zip(parameters(io), tensors, strict=True)})
        seams = partial(StableHloSeams, group=group, prompts=spec.phase == "prefill")
        outputs = run_phase(spec, pair, given, seams)
        return (*outputs, *(given[one.name] for one in io.state))

    return run


def parameters(io: Signature) -> tuple[TensorSpec, ...]:
    """Return the inputs in the order of a compiled graph: the runtime takes arguments first."""
    return (*io.arguments, *io.weights, *io.state)


def _keep_replaced(graph: torch.fx.Graph, io: Signature) -> list[str]:
    """Drop the state outputs that are inputs; return the names of the others."""
    output = next(node for node in graph.nodes if node.op == "output")
    count = len(io.outputs)
    after = list(zip((one.name for one in io.state), output.args[0][count:], strict=True))
    replaced = [(name, node) for name, node in after if node.op != "placeholder"]
    output.args = ((*output.args[0][:count], *(node for _, node in replaced)),)
    return [name for name, _ in replaced]


def _square(x: Tensor, exponent: float) -> Tensor:
    """Multiply instead of raising to the power of 2: not every compiler has powers."""
    return x * x if exponent == 2 else NotImplemented


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum up to each entry of the last axis as a product with a triangle: a windowed reduction is slow on the chip."""
    if dim not in (-1, x.dim() - 1):
        return NotImplemented
    size = x.shape[-1]
    index = torch.arange(size, device=x.device)
    upto = (index[:, None] <= index[None, :]).to(torch.float32)
    return (x.to(torch.float32) @ upto).to(dtype or (x.dtype if x.is_floating_point() else torch.int64))


def _with_tensor(operator: Callable[..., Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Return an operator on bits whose second operand is a number: torch-mlir lowers those of two tensors."""
    return lambda x, number: operator(x, torch.full((), number, dtype=x.dtype, device=x.device))


DECOMPOSITIONS = {
    torch.ops.aten.pow.Tensor_Scalar: _square,
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.bitwise_xor.Scalar: _with_tensor(torch.bitwise_xor),
    torch.ops.aten.__lshift__.Scalar: _with_tensor(torch.bitwise_left_shift),
    torch.ops.aten.__rshift__.Scalar: _with_tensor(torch.bitwise_right_shift),
}


def _cut(exported: Exported) -> None:
    """Replace each call of our own operators by inputs, and add its operands to the outputs."""
    graph = exported.module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.target in OPERATORS]:
        tensors = [one for one in node.args if isinstance(one, torch.fx.Node)]
        numbers = tuple(one for one in node.args if isinstance(one, int))
        exported.cuts.append(Cut(OPERATORS[node.target], numbers))
        exported.operands.append(len(tensors))
        output.args = ((*output.args[0], *tensors),)
        value = node.meta["val"]
        for index, result in enumerate(value if isinstance(value, tuple) else (value,)):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{node.name}_{index}")
            last.meta["val"] = result
            for one in _results(node, index):
                one.replace_all_uses_with(last)
    graph.eliminate_dead_code()


def _results(node: torch.fx.Node, index: int) -> list[torch.fx.Node]:
    """Return the nodes that stand for a result of an operator."""
    if not isinstance(node.meta["val"], tuple):
        return [node]
    return [user for user in node.users if user.target is getitem and user.args[1] == index]
