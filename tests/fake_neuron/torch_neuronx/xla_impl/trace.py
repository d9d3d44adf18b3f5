"""Fake of `generate_hlo`: lowers a module with torch-xla. From NxD's use of it and the ModelBuilder V2 documents."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch_xla
from torch_neuronx.proto import metaneff_pb2
from torch_neuronx.pyhlo import hlo_pb2
from torch_neuronx.xla_impl.structure import Flattener, Packer

XLA = torch_xla._XLAC
DTYPES = {1: torch.bool, 4: torch.int32, 5: torch.int64, 10: torch.float16, 11: torch.float32, 16: torch.bfloat16}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()} | {torch.float64: 12}
LITERALS = {torch.bool: "preds", torch.int32: "s32s", torch.int64: "s64s", torch.float32: "f32s", torch.float64: "f64s"}
XLA_DTYPE_TO_METANEFF_DTYPE = {number: number for number in DTYPES}
CALLS: list[dict[str, Any]] = []
"""Keywords of every call, for tests."""


@dataclass
class HloArtifacts:
    hlo_module: Any
    flattener: Any
    packer: Any
    metaneff: Any
    weights: Any = None
    constant_parameter_tensors: Any = None
    weight_name_to_idx: dict = field(default_factory=dict)


@dataclass
class NeffArtifacts:
    neff_filename: str


def generate_hlo(func, example_inputs, **keywords):
    """Lower `func(**example_inputs)`: inputs, then weights, then state, in the order of the metaneff."""
    CALLS.append(keywords)
    for name in ("cpu_backend", "enable_aliasing", "treat_inputs_as_kwargs"):
        if not keywords.get(name):
            raise RuntimeError(f"the fake SDK lowers with {name}=True only")
    device = torch_xla.device()
    model = func.to(device)
    inputs = {name: tensor.to(device) for name, tensor in example_inputs.items()}
    weights, states = dict(model.named_parameters()), dict(model.named_buffers())
    versions = {name: tensor._version for name, tensor in states.items()}
    torch_xla.sync(wait=True)
    with torch.no_grad():
        results = model(**inputs)
    outputs = [results] if isinstance(results, torch.Tensor) else list(results)
    mutated = [name for name, tensor in states.items() if tensor._version != versions[name]]
    if mutated:
        raise RuntimeError(f"buffers {mutated} are mutated in place, which ModelBuilder V2 does not support")
    after = dict(model.named_buffers())
    replaced = [name for name in states if after[name] is not states[name]]
    context = XLA.lowering.LoweringContext("model")
    context.build(outputs + [after[name] for name in replaced])
    named = {"input": inputs, "weight": weights, "state": states}
    artifacts = _artifacts(context, named, outputs, after, replaced)
    for name in replaced:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = states[name]
    model.to("cpu")
    return artifacts


def _artifacts(context, named, outputs, after, replaced):
    hlo = hlo_pb2.HloModuleProto()
    hlo.ParseFromString(context.hlo())
    numbers = {
        (kind, name): number
        for kind, tensors in named.items()
        for name, tensor in tensors.items()
        if (number := context.tensor_parameter_id(tensor)) >= 0
    }
    constants = {n: t for n, t in context.parameter_id_tensor_mapping().items() if n not in numbers.values()}
    order = [*numbers]
    _renumber(hlo, {numbers[one]: place for place, one in enumerate(order)}, constants)
    meta = metaneff_pb2.MetaNeff()
    kinds = {"input": 1, "weight": 2, "state": 3}
    for kind, name in order:
        tensor = named[kind][name]
        entry = meta.input_tensors.add(type=kinds[kind], shape=list(tensor.shape), data_type=NUMBERS[tensor.dtype])
        setattr(entry, "user_input_key" if kind == "input" else "checkpoint_key", name.encode())
    for tensor in outputs + [after[name] for name in replaced]:
        meta.output_tensors.add(shape=list(tensor.shape), data_type=NUMBERS[tensor.dtype])
    for place, name in enumerate(replaced):
        if ("state", name) not in numbers:
            raise RuntimeError(f"buffer {name} is overwritten without being read; its alias has no input")
        meta.output_aliases_to[len(outputs) + place] = order.index(("state", name))
    unused = [place for place, name in enumerate(named["input"]) if ("input", name) not in numbers]
    flattener = Flattener(tuple(range(len(named["input"]))), unused or None)
    indices = {name: place for place, (kind, name) in enumerate(order) if kind == "weight"}
    packer = Packer(tuple(range(len(outputs))), [], [])
    return HloArtifacts(hlo, flattener, packer, meta, weight_name_to_idx=indices)


def _renumber(hlo, numbers, constants):
    """Give parameters the metaneff's order; make what is no argument, weight or state a constant of the graph."""
    entry = next(c for c in hlo.computations if c.id == hlo.entry_computation_id)
    shapes = {}
    for one in entry.instructions:
        if one.opcode != "parameter":
            continue
        if one.parameter_number in numbers:
            one.parameter_number = numbers[one.parameter_number]
            shapes[one.parameter_number] = one.shape
            continue
        value = constants[one.parameter_number]
        one.opcode, one.parameter_number = "constant", 0
        one.literal.shape.CopyFrom(one.shape)
        getattr(one.literal, LITERALS[value.dtype]).extend(value.cpu().flatten().tolist())
    for program in (entry.program_shape, hlo.host_program_shape):
        del program.parameters[:], program.parameter_names[:]
        for number in range(len(shapes)):
            program.parameters.add().CopyFrom(shapes[number])
            program.parameter_names.append(f"p{number}")


def run_hlo(data, tensors):
    """Run an HLO module with XLA on the CPU: tensors in parameter order -> outputs on the CPU."""
    hlo = hlo_pb2.HloModuleProto()
    hlo.ParseFromString(data)
    _replace_topk(hlo)
    computation = XLA._xla_op_computation_from_module_proto("graph", hlo.SerializeToString())
    device = torch_xla.device()
    outputs = XLA._xla_user_computation("tandem::graph", [tensor.to(device) for tensor in tensors], computation)
    torch_xla.sync(wait=True)
    return [out.cpu() for out in outputs]


def _replace_topk(hlo):
    """XLA's CPU has no AwsNeuronTopK: each becomes a call of torch.topk, lowered for its shape."""
    calls = [i for c in hlo.computations for i in c.instructions if i.custom_call_target == "AwsNeuronTopK"]
    shapes = {i.id: i.shape for c in hlo.computations for i in c.instructions}
    before = []
    for one in calls:
        operand = shapes[one.operand_ids[0]]
        tensor = torch.zeros(list(operand.dimensions), dtype=DTYPES[operand.element_type], device=torch_xla.device())
        tensor = tensor.cpu().to(tensor.device)
        values, indices = torch.topk(tensor, one.shape.tuple_shapes[0].dimensions[-1], dim=-1)
        context = XLA.lowering.LoweringContext("topk")
        context.build([values, indices.int()])
        added = hlo_pb2.HloModuleProto()
        added.ParseFromString(context.hlo())
        entry = _shift(added, max([*shapes, *(c.id for c in [*hlo.computations, *before])]) + 1 + 1000 * len(before))
        before.extend(added.computations)
        replaced = hlo_pb2.HloInstructionProto(name=one.name, opcode="call", id=one.id, operand_ids=one.operand_ids)
        replaced.shape.CopyFrom(one.shape)
        replaced.called_computation_ids.append(entry)
        one.CopyFrom(replaced)
    after = [hlo_pb2.HloComputationProto.FromString(c.SerializeToString()) for c in hlo.computations]
    del hlo.computations[:]
    hlo.computations.extend([*before, *after])  # a computation comes before its callers


def _shift(added, shift):
    """Move a module's ids out of the way of another's; returns its entry's id."""
    for computation in added.computations:
        computation.id += shift
        computation.root_id += shift
        computation.name += f".{shift}"
        for one in computation.instructions:
            one.id += shift
            one.name += f".{shift}"
            for ids in (one.operand_ids, one.called_computation_ids, one.control_predecessor_ids):
                ids[:] = [number + shift for number in ids]
    return added.entry_computation_id + shift


def get_torch_dtype(number):
    return DTYPES[number]


def hlo_entry_computation(hlo):
    return next(c for c in hlo.computations if c.id == hlo.entry_computation_id)


def get_hlo_computation_by_id(hlo, number):
    return next(c for c in hlo.computations if c.id == number)


def get_hlo_root_instruction(computation):
    return next(i for i in computation.instructions if i.id == computation.root_id)


def __getattr__(name):
    """Whatever else NxD imports from here can be imported, not called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def unusable(*arguments, **keywords):
        raise RuntimeError(f"torch_neuronx.xla_impl.trace.{name} is not part of the fake SDK")

    return unusable
