"""A phase as a list of calls of subgraphs; what is between marked calls becomes subgraphs too. Compiles nothing."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pipeline.backends.inductor.subgraphs import (
    NAMESPACE,
    Subgraph,
    SubgraphTracer,
    TextOf,
    meta_of,
    returned,
    subgraph_of,
)


@dataclass(frozen=True)
class Call:
    """One call of a subgraph: the numbers of the values that it takes, and of those that it returns."""

    subgraph: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A phase: values 0 .. `inputs` - 1 are its inputs, and each call adds values."""

    inputs: int
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]
    subgraphs: dict[str, Subgraph]

    def text(self) -> str:
        """Return the canonical text: equal programs have equal subgraphs, by their digests."""
        calls = (f"{call.outputs} = {call.subgraph}{call.inputs}" for call in self.calls)
        return "\n".join([f"inputs {self.inputs}", *calls, f"outputs {self.outputs}"])


def program_of(
    module: Callable[[list[Tensor]], tuple[Tensor, ...]],
    tracer: SubgraphTracer,
    inputs: Sequence[Tensor],
    text_of: TextOf,
) -> Program:
    """Trace a phase whose seams use `tracer`."""
    tracer.find(module, inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.contiguous() for output in module(list(tensors)))

    with torch.no_grad():
        graph = make_fx(run, tracing_mode="fake")(*inputs).graph
    graph.eliminate_dead_code()
    return _Splitter(graph, tracer.subgraphs, text_of).program()


class _Splitter:
    """Groups the nodes of a phase: marked calls in their order, and between some of them one subgraph of other nodes.

    Group g runs after g marked calls. A node may run in each group from the first that has its inputs to the last
    before its users. The fewest groups that have a place for each node are taken, and a node runs in the latest of them
    that it may. So nodes between the steps of a draft that do not depend on the steps are one subgraph, and a subgraph
    has no more than it needs, which other phases can share. Nodes that read or write state keep their place.
    """

    def __init__(self, graph: fx.Graph, subgraphs: dict[str, Subgraph], text_of: TextOf) -> None:
        self.subgraphs = dict(subgraphs)
        self._graph, self._text_of = graph, text_of
        self._marked = [node for node in graph.nodes if _is_marked(node)]
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._between = [n for n in graph.nodes if n.op == "call_function" and not _is_marked(n) and not _is_result(n)]
        self._numbers = {node: number for number, node in enumerate(self._inputs)}
        self._count = len(self._inputs)
        self._calls: list[Call] = []

    def program(self) -> Program:
        """Return the phase as calls."""
        by_group: list[list[fx.Node]] = [[] for _ in range(len(self._marked) + 1)]
        for node, group in self._groups().items():
            by_group[group].append(node)
        for group, nodes in enumerate(by_group):
            if nodes:
                self._call_between(nodes)
            if group < len(self._marked):
                self._call_marked(self._marked[group])
        outputs = tuple(self._numbers[node] for node in returned(self._graph))
        return Program(len(self._inputs), tuple(self._calls), outputs, self.subgraphs)

    def _groups(self) -> dict[fx.Node, int]:
        """Return the group of each node between marked calls."""
        places = self._stateful()
        first, last = self._first(places), self._last(places)
        taken: list[int] = []
        for node in sorted(self._between, key=last.__getitem__):
            if not taken or taken[-1] < first[node]:
                taken.append(last[node])
        return {node: taken[bisect_right(taken, last[node]) - 1] for node in self._between}

    def _first(self, places: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """Return the first group that has a node's inputs, or its place."""
        first = {node: index + 1 for index, node in enumerate(self._marked)} | dict(places)
        for node in self._graph.nodes:
            first.setdefault(node, max((first[source] for source in node.all_input_nodes), default=0))
        return first

    def _last(self, places: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """Return the last group before a node's users, or its place."""
        last = {node: index for index, node in enumerate(self._marked)} | dict(places)
        for node in reversed(self._graph.nodes):
            last.setdefault(node, min((last[user] for user in node.users), default=len(self._marked)))
        return last

    def _stateful(self) -> dict[fx.Node, int]:
        """Return the place among the calls of each node that reads or writes state which the phase writes."""
        touched = {node for node in self._inputs if any(_writes(user, node) for user in node.users)}
        places: dict[fx.Node, int] = {}
        passed = 0
        between = set(self._between)
        for node in self._graph.nodes:
            passed += _is_marked(node)
            if node in between and any(source in touched for source in node.all_input_nodes):
                touched.add(node)
                places[node] = passed
        return places

    def _call_marked(self, node: fx.Node) -> None:
        subgraph = self.subgraphs[_name(node)]
        outputs = self._new(subgraph.outputs)
        self._calls.append(Call(subgraph.name, tuple(self._numbers[source] for source in _nodes(node.args)), outputs))
        if subgraph.outputs == 1:
            self._numbers[node] = outputs[0]
        self._numbers.update({user: outputs[cast("int", user.args[1])] for user in node.users if _is_result(user)})

    def _call_between(self, nodes: Sequence[fx.Node]) -> None:
        """Make a subgraph of some nodes, with the values that others need as its outputs."""
        self._numbers.update({node: self._numbers[state] for node in nodes if (state := _state_of(node)) is not None})
        inside = set(nodes)
        sources = dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside)
        outside = [node for node in nodes if any(user not in inside for user in node.users)]
        results = [node for node in outside if _state_of(node) is None]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for number, source in enumerate(sources):
            copies[source] = graph.placeholder(f"t{number}")
            copies[source].meta["val"] = source.meta["val"].contiguous()
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(_contiguous(graph, copies[node]) for node in results))
        module = fx.GraphModule(torch.nn.Module(), graph)
        subgraph = subgraph_of(module, [meta_of(source.meta["val"]) for source in sources], self._text_of)
        self.subgraphs[subgraph.name] = subgraph
        outputs = self._new(len(results))
        self._calls.append(Call(subgraph.name, tuple(self._numbers[source] for source in sources), outputs))
        self._numbers.update(zip(results, outputs, strict=True))

    def _new(self, count: int) -> tuple[int, ...]:
        first, self._count = self._count, self._count + count
        return tuple(range(first, self._count))


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return the node, or a copy of its value: all values of a program are contiguous."""
    value = node.meta["val"]
    if value.is_contiguous():
        return node
    copy = graph.call_function(torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta["val"] = value.contiguous()
    return copy


def _is_marked(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


def _is_result(node: fx.Node) -> bool:
    """Return whether a node selects one result of a marked call."""
    return node.target is operator.getitem and _is_marked(_nodes(node.args)[0])


def _name(node: fx.Node) -> str:
    """Return the name of the subgraph that a marked call calls."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return str(node.target._opname)


def _nodes(values: Iterable[object]) -> list[fx.Node]:
    """Return the nodes among values."""
    return [value for value in values if isinstance(value, fx.Node)]


def _state_of(node: fx.Node) -> fx.Node | None:
    """Return the input that a node writes in place, and so stands for; None for other nodes."""
    written = next((source for source in node.all_input_nodes if _writes(node, source)), None)
    if written is None or written.op == "placeholder":
        return written
    return _state_of(written)


def _writes(node: fx.Node, value: fx.Node) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    pairs = zip(target._schema.arguments, node.args, strict=False)
    return any(given is value and a.alias_info is not None and a.alias_info.is_write for a, given in pairs)
