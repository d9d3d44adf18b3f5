"""Canonical text of a traced graph, equal on two machines, and its parts that neuronx-cc does not support.

Works on any protobuf message shaped like XLA's `HloModuleProto`; imports neither torch nor the SDK. Names, ids and
source metadata are left out of the text: they change with the folder, the line and the order of tracing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

FLOAT = {10: "f16", 11: "f32", 16: "bf16"}
INTEGER = {2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64"}
DTYPES = {1: "pred", **INTEGER, **FLOAT}
"""Data types of a device that our graphs may use, by XLA's number (xla_data.proto); no 64-bit or complex floats."""

FOREIGN = {12: "f64", 15: "c64", 18: "c128"}

DOCUMENTED = frozenset((
    "abs", "add", "all-gather", "all-reduce", "atan2", "batch-norm-grad", "batch-norm-inference",
    "batch-norm-training", "bitcast-convert", "broadcast", "ceil", "clamp", "compare", "concatenate", "constant",
    "convert", "cosine", "custom-call", "divide", "dot", "dynamic-update-slice", "exponential", "floor", "gather",
    "get-tuple-element", "iota", "log", "and", "not", "maximum", "minimum", "multiply", "negate", "pad", "power",
    "reduce", "reshape", "reverse", "rng-bit-generator", "rng", "rsqrt", "scatter", "select", "select-and-scatter",
    "shift-right-logical", "sign", "sine", "slice", "sqrt", "subtract", "tanh", "transpose", "tuple",
))  # fmt: skip
"""HLO of the compiler's list of supported operators (Neuron compiler release notes, "Supported Operators")."""

NAMED_LATER = frozenset(["logistic", "or", "reduce-scatter", "reduce-window"])
"""HLO that the list lacks and other documents name: `logistic` (release notes), `reduce-window` (NCC_EVRF017 to 19),
`reduce-scatter` (NCC_EVRF061)."""

STRUCTURE = frozenset(["parameter", "call", "bitcast", "copy"])
"""Not computations."""

CUSTOM_CALLS = frozenset((
    "AwsNeuronErf", "AwsNeuronGelu", "AwsNeuronGeluApprxTanh", "AwsNeuronGeluBackward", "AwsNeuronSilu",
    "AwsNeuronSiluBackward", "AwsNeuronRmsNorm", "AwsNeuronSoftmax", "AwsNeuronSoftmaxBackward",
    "AwsNeuronCollectiveMatmul", "AwsNeuronIntMatmult", "AwsNeuronArgMax", "AwsNeuronArgMin", "AwsNeuronTopK",
    "AwsNeuronDropoutMaskV1", "AwsNeuronCustomNativeKernel", "AwsNeuronCustomOp", "AwsNeuronDevicePrint",
    "ResizeNearest", "ResizeBilinear", "ResizeNearestGrad", "AwsNeuronLNCShardingConstraint",
    "AwsNeuronTransferWithStaticRing", "AwsNeuronModuleMarkerStart-Forward", "AwsNeuronModuleMarkerStart-Backward",
    "AwsNeuronModuleMarkerEnd-Forward", "AwsNeuronModuleMarkerEnd-Backward", "NeuronBoundaryMarker-Start",
    "NeuronBoundaryMarker-End",
))  # fmt: skip
"""The custom calls that the compiler recognises (Neuron SDK 2.29, NCC_EVRF015)."""

TOP_K = "AwsNeuronTopK"

VOLATILE = frozenset(
    ["name", "id", "metadata", "operand_ids", "called_computation_ids", "control_predecessor_ids", "channel_id"]
)
XLA_BUILDER = {
    "mul": "multiply", "div": "divide", "sub": "subtract", "neg": "negate", "max": "maximum", "min": "minimum",
    "exp": "exponential", "cos": "cosine", "sin": "sine", "rev": "reverse", "reversereverse": "reverse", "pow": "power",
    "eq": "compare", "ne": "compare", "lt": "compare", "le": "compare", "gt": "compare", "ge": "compare",
    "convertelementtype": "convert", "bitcastconverttype": "bitcast-convert", "logicaland": "and", "logicalor": "or",
    "logicalnot": "not", "dotgeneral": "dot", "broadcastindim": "broadcast", "constantliteral": "constant",
    "rnguniform": "rng", "batchnorm": "batch-norm-training",
}  # fmt: skip
"""Names of `neuronx-cc list-operators` that differ from the HLO name without hyphens."""


def canonical(hlo: Any, meta: Any) -> bytes:
    """Return the graph as text: computations in call order, instructions by position, then inputs."""
    return "\n".join([*_module(hlo), *_inputs(meta)]).encode()


def stripped(hlo: Any) -> bytes:
    """Return the module as bytes for the compiler, without source files and lines, which the NEFF would store."""
    copy = type(hlo)()
    copy.CopyFrom(hlo)
    for computation in copy.computations:
        for instruction in computation.instructions:
            if "metadata" in instruction.DESCRIPTOR.fields_by_name:
                instruction.ClearField("metadata")
    if "stack_frame_index" in copy.DESCRIPTOR.fields_by_name:
        copy.ClearField("stack_frame_index")
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


def operators(listing: str) -> frozenset[str]:
    """Return the HLO opcodes in the output of `neuronx-cc list-operators --framework XLA`."""
    by_letters = {opcode.replace("-", ""): opcode for opcode in DOCUMENTED | NAMED_LATER}
    opcodes = set()
    for line in listing.split():
        name = re.sub(r"[^a-z0-9]", "", line.lower())
        opcodes.add(XLA_BUILDER.get(name) or by_letters.get(name) or line.lower().replace("_", "-"))
    return frozenset(opcodes)


def unlisted(hlo: Any, listed: frozenset[str]) -> list[str]:
    """Return the operators and custom calls of a graph that are in no list of what the compiler supports."""
    known = listed | NAMED_LATER | STRUCTURE
    instructions = [instruction for computation in hlo.computations for instruction in computation.instructions]
    calls = {i.custom_call_target for i in instructions if i.opcode == "custom-call"}
    return sorted(({i.opcode for i in instructions} - known - {"custom-call"}) | (calls - CUSTOM_CALLS))


def faults(hlo: Any) -> list[str]:
    """Return one sentence with an error code for each part of a graph that the compiler would refuse or compute wrong.

    Which operators it has is its own decision (`unlisted`): its published lists lack some that it compiles.
    """
    roots = {c.id: next(i for i in c.instructions if i.id == c.root_id) for c in hlo.computations}
    shapes = {i.id: i.shape.element_type for c in hlo.computations for i in c.instructions}
    sentences = {
        fault
        for computation in hlo.computations
        for instruction in computation.instructions
        for fault in _instruction_faults(instruction, roots, shapes)
    }
    return sorted(sentences)


def collectives(hlo: Any) -> dict[str, int]:
    """Return how many all-reduces, all-gathers and reduce-scatters a graph has."""
    codes = [i.opcode for c in hlo.computations for i in c.instructions]
    return {code: codes.count(code) for code in ("all-reduce", "all-gather", "reduce-scatter") if code in codes}


def _instruction_faults(instruction: Any, roots: Mapping[int, Any], shapes: Mapping[int, int]) -> Iterator[str]:
    kind = instruction.shape.element_type
    if kind in FOREIGN:
        yield f"data type {FOREIGN[kind]} is not supported (NCC_ESPP004)"
    if instruction.opcode == "constant" and kind == 5 and any(abs(v) >= 1 << 31 for v in instruction.literal.s64s):
        yield "a 64-bit constant does not fit 32 bits, to which integers are narrowed (NCC_ESFH002)"
    operands = [shapes.get(i, 0) for i in instruction.operand_ids]
    if instruction.opcode in ("all-reduce", "reduce-scatter") and any(o in INTEGER for o in operands):
        yield f"{instruction.opcode} of integers is computed in float32 (NCC_EVRF061)"
    if instruction.opcode == "dot" and any(o in INTEGER for o in operands):
        yield "dot of integers is computed in float32 (NCC_EVRF035)"
    combines = instruction.opcode == "scatter" and roots[instruction.called_computation_ids[0]].opcode != "parameter"
    if combines and operands[0] in INTEGER:
        yield "scatter that combines integers is computed in float32 (NCC_EVRF060)"
    is_top_k = instruction.opcode == "custom-call" and instruction.custom_call_target == TOP_K
    if is_top_k and any(operand in INTEGER for operand in operands):
        yield "TopK does not take integers (NCC_EVRF013)"


def _module(hlo: Any) -> Iterator[str]:
    by_id = {computation.id: computation for computation in hlo.computations}
    order: list[int] = []
    waiting = [hlo.entry_computation_id]
    while waiting:
        current = waiting.pop(0)
        if current not in order:
            order.append(current)
            waiting.extend(called for i in by_id[current].instructions for called in i.called_computation_ids)
    channels: dict[int, int] = {}
    for number, key in enumerate(order):
        computation = by_id[key]
        indices = {instruction.id: index for index, instruction in enumerate(computation.instructions)}
        for index, instruction in enumerate(computation.instructions):
            channel_id, called = instruction.channel_id, instruction.called_computation_ids
            channel = channels.setdefault(channel_id, len(channels)) if channel_id else ""
            links = [[indices[i] for i in instruction.operand_ids], [order.index(i) for i in called]]
            root = "root " if instruction.id == computation.root_id else ""
            yield f"{root}{number}.{index} {links} {channel} {_fields(instruction)}"


def _fields(message: Any) -> str:
    """Return all set fields except volatile ones; messages as their bytes, in the order of field numbers."""
    parts = []
    for field, value in message.ListFields():
        if field.name in VOLATILE:
            continue
        parts.append(f"{field.name}={_value(value)}")
    return " ".join(parts)


def _value(value: Any) -> str:
    if hasattr(value, "SerializeToString"):
        data: bytes = value.SerializeToString(deterministic=True)
        return data.hex()
    if isinstance(value, str | bytes | int | float | bool):
        return repr(value)
    return "[" + ", ".join(_value(item) for item in value) + "]"


def _inputs(meta: Any) -> Iterator[str]:
    """Yield each parameter's name, each output, and the outputs that alias state."""
    for tensor in meta.input_tensors:
        keys = f"{tensor.user_input_key!r} {tensor.checkpoint_key!r}"
        yield f"input {tensor.type} {keys} {list(tensor.shape)} {tensor.data_type}"
    for tensor in meta.output_tensors:
        yield f"output {list(tensor.shape)} {tensor.data_type}"
    for key in sorted(meta.output_aliases_to):
        yield f"alias {key} -> {meta.output_aliases_to[key]}"
