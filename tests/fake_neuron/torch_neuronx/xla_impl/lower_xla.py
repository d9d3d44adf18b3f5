"""Lowering with torch-xla: HLO of the module, with parameters in the order of its metaneff."""

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch_xla.core import xla_builder
from torch_neuronx.pyhlo import hlo_pb2

XLA = torch_xla._XLAC
DTYPES = {1: torch.bool, 4: torch.int32, 5: torch.int64, 10: torch.float16, 11: torch.float32, 16: torch.bfloat16}
LITERALS = {torch.bool: "preds", torch.int32: "s32s", torch.int64: "s64s", torch.float32: "f32s", torch.float64: "f64s"}


def begin():
    """Forget what earlier lowerings left pending: it has no contents to be run on."""
    torch_xla._XLAC._clear_pending_irs("xla:0")
    torch_xla.sync(wait=True)


def placeholder(tensor):
    """A tensor without contents that becomes a parameter: large models are lowered without their weights."""
    empty = xla_builder.create_placeholder_tensor(list(tensor.shape), tensor.dtype)
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty


def lower(named, results):
    """HLO of `results` -> (module, the parameters' order). `named` are all tensors that may be a parameter."""
    xm.wait_device_ops()  # uploads of scalars
    context = XLA.lowering.LoweringContext("model")
    context.build(results)
    hlo = hlo_pb2.HloModuleProto()
    hlo.ParseFromString(context.hlo())
    numbers = {one: number for one, tensor in named.items() if (number := context.tensor_parameter_id(tensor)) >= 0}
    every = context.device_parameter_id_tensor_mapping()
    constants = {number: tensor.cpu() for number, tensor in every.items() if number not in numbers.values()}
    order = [*numbers]
    _renumber(hlo, {numbers[one]: place for place, one in enumerate(order)}, constants)
    return hlo, order


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
