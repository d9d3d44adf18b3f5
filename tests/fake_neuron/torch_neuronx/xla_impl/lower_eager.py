"""Lowering without torch-xla, for the fast tests: an exported program in place of HLO, which names no HLO operators.

Every node of the program is an instruction `call` that carries its operator's name, so that canonical texts differ
where programs do. Collectives of more than one rank are not run.
"""

import io
import typing
from unittest import mock

import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from torch.utils import _pytree as pytree

F = descriptor_pb2.FieldDescriptorProto
FIELDS = {
    "Shape": [("element_type", 2, F.TYPE_INT32, ""), ("dimensions", 3, F.TYPE_INT64, "*")],
    "Literal": [("s64s", 6, F.TYPE_INT64, "*")],
    "Instruction": [
        ("name", 1, F.TYPE_STRING, ""), ("opcode", 2, F.TYPE_STRING, ""), ("shape", 3, F.TYPE_MESSAGE, ".fake.Shape"),
        ("literal", 8, F.TYPE_MESSAGE, ".fake.Literal"), ("parameter_number", 9, F.TYPE_INT64, ""),
        ("channel_id", 26, F.TYPE_INT64, ""), ("custom_call_target", 28, F.TYPE_STRING, ""),
        ("id", 35, F.TYPE_INT64, ""),
        ("operand_ids", 36, F.TYPE_INT64, "*"), ("called_computation_ids", 38, F.TYPE_INT64, "*"),
        ("backend_config", 43, F.TYPE_BYTES, ""),
    ],
    "Computation": [
        ("name", 1, F.TYPE_STRING, ""), ("instructions", 2, F.TYPE_MESSAGE, "*.fake.Instruction"),
        ("id", 5, F.TYPE_INT64, ""), ("root_id", 6, F.TYPE_INT64, ""),
    ],
    "HloModule": [
        ("name", 1, F.TYPE_STRING, ""), ("computations", 3, F.TYPE_MESSAGE, "*.fake.Computation"),
        ("entry_computation_id", 6, F.TYPE_INT64, ""), ("program", 100, F.TYPE_BYTES, ""),
    ],
}  # fmt: skip


def _messages():
    file = descriptor_pb2.FileDescriptorProto(name="fake_hlo.proto", package="fake", syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, more in fields:
            label = F.LABEL_REPEATED if more.startswith("*") else F.LABEL_OPTIONAL
            one = message.field.add(name=field, number=number, type=kind, label=label)
            if kind == F.TYPE_MESSAGE:
                one.type_name = more.lstrip("*")
    pool = descriptor_pool.Default()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"fake.{name}")) for name in FIELDS}


HloModuleProto = _messages()["HloModule"]
"""As much of XLA's message as Tandem reads, and the exported program."""


def begin():
    pass


def placeholder(tensor):
    return tensor


def lower(named, results, model, replaced):
    """Export the model as a function of a flat list -> (module, order)."""
    order, values = [*named], [*named.values()]
    with torch.no_grad():
        program = torch.export.export(_Flat(model, replaced, order), (values,), strict=False)
    data = io.BytesIO()
    torch.export.save(program, data)
    hlo = HloModuleProto(name="fake", entry_computation_id=1, program=data.getvalue())
    entry = hlo.computations.add(name="entry", id=1)
    numbers = {}
    for place, node in enumerate(program.graph.nodes, start=1):
        numbers[node] = place
        opcode = "parameter" if node.op == "placeholder" else "call"
        arguments = pytree.tree_map(lambda a: "" if isinstance(a, torch.fx.Node) else str(a), (node.args, node.kwargs))
        one = entry.instructions.add(
            name=node.name, opcode=opcode, id=place, backend_config=f"{node.target}{arguments}".encode()
        )
        one.operand_ids.extend(numbers[source] for source in node.all_input_nodes)
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            one.shape.dimensions.extend(value.shape)
    entry.root_id = len(numbers)
    return hlo, order


class _Flat(torch.nn.Module):
    """The model as a function of a list; held outside nn.Module's registry, so that it is no part of the export."""

    def __init__(self, model, replaced, order):
        super().__init__()
        self.held = [model]
        self.replaced, self.order = replaced, order

    def forward(self, tensors):
        model, given = self.held[0], dict(zip(self.order, tensors, strict=True))
        before = []
        for (kind, name), tensor in given.items():
            if kind != "input":
                owner, _, leaf = name.rpartition(".")
                table = (
                    model.get_submodule(owner)._parameters if kind == "weight" else model.get_submodule(owner)._buffers
                )
                before.append((table, leaf, table[leaf]))
                table[leaf] = tensor
        try:
            results = model(**{name: tensor for (kind, name), tensor in given.items() if kind == "input"})
            buffers = dict(model.named_buffers())
            return (*results, *(buffers[name] for name in self.replaced))
        finally:
            for table, leaf, tensor in before:
                table[leaf] = tensor


def run_hlo(data, tensors):
    """Run the program on the CPU."""
    hlo = HloModuleProto.FromString(data)
    module = _loaded(hlo.program)
    with torch.no_grad():
        return list(module(list(tensors)))


_get_type_hints, _hints = typing.get_type_hints, {}


def _type_hints(kind, globalns):
    """As typing's, once for each class: torch asks again for every value that it reads."""
    if kind not in _hints:
        _hints[kind] = _get_type_hints(kind, globalns=globalns)
    return _hints[kind]


_programs: dict[bytes, torch.nn.Module] = {}


def _loaded(program):
    if program not in _programs:
        with mock.patch.object(typing, "get_type_hints", _type_hints):
            _programs[program] = torch.export.load(io.BytesIO(program)).module()
    return _programs[program]
