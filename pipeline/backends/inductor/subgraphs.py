"""Split a phase into subgraphs: functions of given shapes that graphs call, each compiled once.

All layers of a decoder are one function of other weights, and so are all steps of a draft. `Seams.once` marks such a
function, and what lies between two marked calls is a subgraph as well. A phase is then a list of calls (`Program`): the
time to compile it hardly depends on its layers, and graphs share their subgraphs. Compiles nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pipeline.models.parallel import Seams

NAMESPACE = "tandem_subgraph"
"""Namespace of the operators that stand for marked calls while a phase is traced."""

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
DEFINED: set[str] = set()
"""Operators of this process: torch allows one definition of each."""

Function = Callable[..., Any]
TextOf = Callable[[fx.Graph], str]
"""Returns the canonical text of a graph."""
Stage = Literal["find", "trace", "call"]


class Meta(NamedTuple):
    """Shape and dtype of a contiguous tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(self.shape, dtype=self.dtype)


def meta_of(tensor: Tensor) -> Meta:
    """Return shape and dtype of a tensor."""
    return Meta(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class Subgraph:
    """A traced subgraph: its name, which is a digest of its text, its graph, and the inputs that it writes in place."""

    name: str
    ir: bytes
    module: fx.GraphModule
    inputs: tuple[Meta, ...]
    written: tuple[bool, ...]
    outputs: int


def subgraph_of(module: fx.GraphModule, inputs: Sequence[Meta], text_of: TextOf) -> Subgraph:
    """Return a traced function as a subgraph."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    mutated = _written(module.graph)
    written = tuple(node in mutated for node in nodes)
    ir = f"{text_of(module.graph)}\n{tuple(inputs)} {written}".encode()
    name = f"p{hashlib.sha256(ir).hexdigest()[:16]}"
    return Subgraph(name, ir, module, tuple(inputs), written, len(returned(module.graph)))


def returned(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values a graph returns, in order."""
    return list(cast("tuple[fx.Node, ...]", graph.output_node().args[0]))


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Return the inputs of a graph that it writes in place."""
    mutated = set()
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    mutated.add(value)
    return {node for node in mutated if node.op == "placeholder"}


class Skeleton(NamedTuple):
    """A value without its tensors: a text, equal for equal values, and a function that puts tensors back."""

    text: str
    filled: Callable[[Sequence[Tensor]], Any]


def skeleton(value: Any, tensors: list[Tensor]) -> Skeleton:
    """Append the tensors of a value to `tensors` and return the rest of it."""
    if isinstance(value, Tensor):
        index = len(tensors)
        tensors.append(value)
        return Skeleton("_", lambda given: given[index])
    if isinstance(value, Seams):
        if value.live is not None:
            index = len(tensors)
            tensors.append(value.live)
            return Skeleton(f"{type(value).__qualname__}:{value.tp}:_", lambda given: value.of_live(given[index]))
        return Skeleton(f"{type(value).__qualname__}:{value.tp}", lambda _: value)
    if is_dataclass(value) and not isinstance(value, type):
        return _of_names(type(value), {field.name: getattr(value, field.name) for field in fields(value)}, tensors)
    if isinstance(value, dict):
        return _of_names(dict, value, tensors)
    if isinstance(value, list | tuple):
        items = [skeleton(item, tensors) for item in value]
        make = type(value)._make if hasattr(value, "_make") else type(value)
        text = f"{type(value).__qualname__}({','.join(inner.text for inner in items)})"
        return Skeleton(text, lambda given: make(inner.filled(given) for inner in items))
    return Skeleton(repr(value), lambda _: value)


def _of_names(kind: Callable[..., Any], items: dict[str, Any], tensors: list[Tensor]) -> Skeleton:
    skeletons = {name: skeleton(item, tensors) for name, item in items.items()}
    text = f"{kind.__qualname__}({','.join(f'{name}={inner.text}' for name, inner in skeletons.items())})"
    return Skeleton(text, lambda given: kind(**{name: inner.filled(given) for name, inner in skeletons.items()}))


@dataclass
class _Marked:
    """A marked function for given shapes: its arguments without tensors, what it returns, and its subgraph."""

    function: Function
    arguments: Skeleton
    inputs: tuple[Meta, ...]
    result: Skeleton
    outputs: tuple[Meta, ...]
    subgraph: Subgraph | None = None
    used: tuple[int, ...] = ()
    """Tensors of a call that the subgraph reads or writes."""


class SubgraphTracer:
    """Finds the marked calls of a phase and traces their functions; then each call is one operator.

    Stages: `find` runs the phase on tensors without memory, `trace` traces each function once, and while the phase is
    traced itself, `call` puts operators in the place of the calls.
    """

    def __init__(self, text_of: TextOf) -> None:
        self.stage: Stage = "find"
        self._text_of = text_of
        self._marked: dict[str, _Marked] = {}

    @property
    def subgraphs(self) -> dict[str, Subgraph]:
        """The traced subgraphs by their names."""
        return {marked.subgraph.name: marked.subgraph for marked in self._marked.values() if marked.subgraph}

    def find(self, phase: Callable[[list[Tensor]], object], inputs: Sequence[Tensor]) -> None:
        """Run a phase on tensors like `inputs`, and trace every marked function."""
        with FakeTensorMode(), torch.no_grad():
            phase([meta_of(tensor).empty() for tensor in inputs])
        self.stage = "trace"
        for marked in self._marked.values():
            self._trace(marked)
        self.stage = "call"

    def call(self, function: Function, *args: Any) -> Any:
        """Call a marked function: record it, run it, or call its operator."""
        if self.stage == "trace":  # a marked call inside a subgraph belongs to it
            return function(*args)
        tensors: list[Tensor] = []
        arguments = skeleton(args, tensors)
        inputs = tuple(map(meta_of, tensors))
        key = f"{function.__module__}.{function.__qualname__}{arguments.text}{inputs}"
        if self.stage == "call":
            return self._call_operator(self._marked[key], tensors)
        if key not in self._marked:
            self.stage = "trace"
            outputs: list[Tensor] = []
            result = skeleton(function(*args), outputs)
            self.stage = "find"
            self._marked[key] = _Marked(function, arguments, inputs, result, tuple(map(meta_of, outputs)))
        marked = self._marked[key]
        return marked.result.filled([meta.empty() for meta in marked.outputs])

    def _call_operator(self, marked: _Marked, tensors: Sequence[Tensor]) -> Any:
        assert marked.subgraph is not None
        pairs = zip(marked.used, marked.subgraph.written, strict=True)
        operator = getattr(getattr(torch.ops, NAMESPACE), marked.subgraph.name).default
        result = operator(*(tensors[index] if written else tensors[index].contiguous() for index, written in pairs))
        return marked.result.filled([result] if isinstance(result, Tensor) else list(result))

    def _trace(self, marked: _Marked) -> None:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            outputs: list[Tensor] = []
            skeleton(marked.function(*marked.arguments.filled(tensors)), outputs)
            return tuple(output.contiguous() for output in outputs)

        with torch.no_grad():
            module = make_fx(run, tracing_mode="fake")(*(meta.empty() for meta in marked.inputs))
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        marked.used = tuple(index for index, node in enumerate(nodes) if node.users)
        for node in nodes:
            if not node.users:
                module.graph.erase_node(node)
        module.recompile()
        marked.subgraph = subgraph_of(module, [marked.inputs[index] for index in marked.used], self._text_of)
        _define(marked.subgraph, marked.outputs)


def _define(subgraph: Subgraph, outputs: Sequence[Meta]) -> None:
    """Define the operator that stands for calls of a subgraph."""
    if subgraph.name in DEFINED:
        return
    arguments = [f"Tensor(a{i}!) t{i}" if written else f"Tensor t{i}" for i, written in enumerate(subgraph.written)]
    returns = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
    LIBRARY.define(f"{subgraph.name}({', '.join(arguments)}) -> {returns}")

    def fake(*_: Tensor) -> Tensor | tuple[Tensor, ...]:
        tensors = tuple(meta.empty() for meta in outputs)
        return tensors[0] if len(tensors) == 1 else tensors

    torch.library.register_fake(f"{NAMESPACE}::{subgraph.name}", fake, lib=LIBRARY)
    DEFINED.add(subgraph.name)
