"""The StableHLO frontend: a phase traced by torch, lowered by torch-mlir, as an HLO module with aliased state.

A build host needs neither torch-xla nor NxD. torch-mlir lowers plain operators. An operator of `operators.py` becomes
an output (its operands) and an input (its results) of the graph that torch-mlir lowers, and is put between them
afterwards. jaxlib has XLA's own conversion of StableHLO to HLO.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.backends.neuron.boundary import Boundary, Kind, Place
from pipeline.backends.neuron.export import Exported, export, parameters, phase
from pipeline.backends.neuron.hlo_messages import read_module
from pipeline.backends.neuron.operators import Emitter
from pipeline.errors import HostError
from pipeline.graphs.module import empty
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec, PairSpec

UNKNOWN = re.compile(r"failed to legalize operation '([\w.]+)'(?:.*?name = \"([\w.]+)\")?", re.DOTALL)
TORCH = Path(torch.__file__).parent
RESULTS = {"top_k": 2}
"""Operators with more than one result."""
REPORT = "please report this bug of Tandem; `frontend: xla` lowers the same graph with PyTorch/XLA"


@dataclass(frozen=True)
class Lowered:
    """A graph as HLO, and what its parameters and results are."""

    hlo: Any
    boundary: Boundary


def trace(spec: GraphSpec, pair: PairSpec, io: Signature, group: Sequence[int]) -> Lowered:
    """Trace one graph to HLO.

    Raises:
        HostError: names an operator without a lowering, and the line of its call.

    """
    exported = export(spec, pair, io, group)
    try:
        text = to_stablehlo(exported.module)
    except UnknownOperatorError as error:
        raise unlowered(error, phase(spec, pair, io, group), io, spec.name) from error
    return to_hlo(exported, text, io, group)


def to_stablehlo(module: torch.fx.GraphModule) -> str:
    """Lower a graph of plain operators with torch-mlir.

    Raises:
        UnknownOperator: an operator without a lowering.

    """
    from torch_mlir import compiler_utils, fx, ir  # of an extra, only while tracing
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.extras.fx_importer import FxImporter

    found: list[str] = []

    def note(diagnostic: Any) -> bool:
        found.append(diagnostic.message)
        return True

    context = ir.Context()
    dialect.register_dialect(context)
    handler = context.attach_diagnostic_handler(note)
    try:
        return str(fx.stateless_fx_import(module, "stablehlo", FxImporter(context=context)))
    except (NotImplementedError, compiler_utils.TorchMlirCompilerError) as error:
        raise UnknownOperatorError("\n".join([*found, str(error)])) from error
    finally:
        handler.detach()


class UnknownOperatorError(Exception):
    """torch-mlir cannot lower a graph; `operator` is the name in its message, such as `aten.sort`, or empty."""

    def __init__(self, message: str) -> None:
        match = UNKNOWN.search(message)
        self.operator = "" if match is None else (match[2] or match[1]).removeprefix("torch.")
        super().__init__(message.strip()[:500])


class Callers(TorchDispatchMode):
    """Notes where an operator is called, outside of torch."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator, self.where = operator, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.where and str(func).startswith(self.operator):
            frames = [one for one in traceback.extract_stack()[:-1] if TORCH not in Path(one.filename).parents]
            self.where = f"{frames[-1].filename}:{frames[-1].lineno}"
        return func(*args, **(kwargs or {}))


def unlowered(error: UnknownOperatorError, run: Callable[..., Any], io: Signature, name: str) -> HostError:
    """Return the error for a graph that torch-mlir cannot lower: the operator, and the line of its first call."""
    if not error.operator:
        return HostError(f"torch-mlir cannot lower this graph: {error}", where=f"trace {name}", fix=REPORT)
    with torch.no_grad(), FakeTensorMode(), Callers(error.operator) as callers:
        run(*empty(parameters(io)))
    called = f", called in {callers.where}" if callers.where else ""
    what = f"torch-mlir has no lowering to StableHLO for {error.operator}{called}"
    return HostError(what, where=f"trace {name}", fix=REPORT)


def to_hlo(exported: Exported, text: str, io: Signature, group: Sequence[int]) -> Lowered:
    """Put our own operators into a StableHLO module, drop unused parameters, alias state; convert to HLO."""
    from jaxlib import _jax  # of an extra, only while tracing
    from jaxlib.mlir import ir
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext
    from jaxlib.mlir.dialects import chlo, stablehlo

    with ir.Context() as context, ir.Location.unknown():
        registry = ir.DialectRegistry()
        _jax_mlir_ext.register_dialects(registry)
        context.append_dialect_registry(registry)
        context.load_all_available_dialects()
        for dialect in (chlo, stablehlo):
            dialect.register_dialect(context)
        module = ir.Module.parse(text)
        function = module.body.operations[0]
        kept = _splice(exported, function, Emitter(ir, group), len(io.outputs))
        module.operation.verify()
        bytecode = _bytecode(module)
    hlo = read_module(_jax.mlir.mlir_module_to_xla_computation(bytecode).as_serialized_hlo_module_proto())
    return Lowered(hlo, boundary_of(exported, io, kept))


def _splice(exported: Exported, function: Any, to: Emitter, outputs: int) -> list[int]:
    """Put our own operators between their operands and results; return the positions of the parameters that remain."""
    ir = to.ir
    block = function.regions[0].blocks[0]
    operations = list(block.operations)
    end = operations[-1]
    parameter, operand = len(exported.inputs), outputs + len(exported.replaced)
    makers = _makers(block, end)
    returned = operand
    for number, (cut, count) in enumerate(zip(exported.cuts, exported.operands, strict=True), start=1):
        operands = [end.operands[operand + i] for i in range(count)]
        results = [block.arguments[parameter + i] for i in range(RESULTS.get(cut.operator, 1))]
        place, maker = max((makers[operand + i] for i in range(count)), key=lambda one: one[0])
        with ir.InsertionPoint.at_block_begin(block) if maker is None else ir.InsertionPoint.after(maker):
            made = to.emit(cut, operands, [one.type for one in results])
        waiting = [i for i, (_, one) in makers.items() if one is None and end.operands[i] in results]
        for old, new in zip(results, made, strict=True):
            old.replace_all_uses_with(new)
        makers |= dict.fromkeys(waiting, ((place[0], number), made[-1].owner))
        operand, parameter = operand + count, parameter + len(results)
    values = [end.operands[i] for i in range(returned)]
    with ir.InsertionPoint(end):
        ir.Operation.create("func.return", [], values)
    end.erase()
    return _parameters(exported, function, ir, outputs)


def _makers(block: Any, end: Any) -> dict[int, tuple[tuple[int, int], Any]]:
    """Return the position and the operation of each returned value; a parameter has none.

    Positions are read before anything changes: an operation's hash in MLIR's Python changes with its operands.
    """
    order = {operation: index for index, operation in enumerate(block.operations)}
    makers = {}
    for index in range(len(end.operands)):
        owner = end.operands[index].owner
        makers[index] = ((order[owner], 0), owner) if owner in order else ((-1, 0), None)
    return makers


def _parameters(exported: Exported, function: Any, ir: Any, outputs: int) -> list[int]:
    """Remove unused parameters; mark those whose memory a result has."""
    block = function.regions[0].blocks[0]
    aliases = {name: outputs + index for index, name in enumerate(exported.replaced)}
    names = [one.name for one in exported.inputs]
    kept = [i for i, name in enumerate(names) if name in aliases or any(True for _ in block.arguments[i].uses)]
    for index in reversed(range(len(block.arguments))):
        if index not in kept:
            block.erase_argument(index)
    results = [one.type for one in list(block.operations)[-1].operands]
    kind = ir.FunctionType.get([one.type for one in block.arguments], results)
    function.attributes["function_type"] = ir.TypeAttr.get(kind)
    attributes = [
        {"tf.aliasing_output": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), aliases[names[i]])}
        if names[i] in aliases else {}
        for i in kept
    ]  # fmt: skip
    function.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(one) for one in attributes])
    return kept


def _bytecode(module: Any) -> bytes:
    buffer = BytesIO()
    module.operation.write_bytecode(file=buffer)
    return buffer.getvalue()


def boundary_of(exported: Exported, io: Signature, kept: Sequence[int]) -> Boundary:
    """Return what the parameters that remain are, and which results alias state."""
    kinds: dict[str, Kind] = dict.fromkeys((one.name for one in io.weights), "weight")
    kinds |= dict.fromkeys((one.name for one in io.state), "state")
    inputs = [exported.inputs[i] for i in kept]
    places = tuple(Place(kinds.get(one.name, "argument"), one) for one in inputs)
    positions = {one.name: index for index, one in enumerate(inputs)}
    states = {one.name: one for one in io.state}
    results = (*io.outputs, *(states[name] for name in exported.replaced))
    aliases = {len(io.outputs) + i: positions[name] for i, name in enumerate(exported.replaced)}
    return Boundary(places, results, aliases)
