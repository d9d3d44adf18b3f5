"""XLA's `HloModuleProto` as protobuf messages, with the fields that Tandem reads or writes; needs protobuf alone.

Numbers are those of XLA's hlo.proto and xla_data.proto. Fields that are not listed are kept when a module is read and
written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import count
from typing import Any

PACKAGE = "tandem.neuron"
MODULE, COMPUTATION, INSTRUCTION = "HloModule", "HloComputation", "HloInstruction"
FIELDS: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "Shape": {"element_type": (2, "int32"), "dimensions": (3, "int64*"), "tuple_shapes": (4, "Shape*")},
    "Literal": {"s64s": (6, "int64*")},
    "Metadata": {"op_name": (2, "string"), "source_file": (3, "string"), "source_line": (4, "int32")},
    "StackFrames": {},
    "ReplicaGroup": {"replica_ids": (1, "int64*")},
    "DeviceList": {"replica_groups": (1, "ReplicaGroup*")},
    "DotNumbers": {
        "lhs_contracting_dimensions": (1, "int64*"),
        "rhs_contracting_dimensions": (2, "int64*"),
        "lhs_batch_dimensions": (3, "int64*"),
    },
    "Alias": {"output_shape_index": (1, "int64*"), "parameter_number": (2, "int64")},
    "Aliases": {"entries": (1, "Alias*")},
    INSTRUCTION: {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "shape": (3, "Shape"),
        "metadata": (7, "Metadata"),
        "literal": (8, "Literal"),
        "parameter_number": (9, "int64"),
        "dot_dimension_numbers": (30, "DotNumbers"),
        "channel_id": (26, "int64"),
        "custom_call_target": (28, "string"),
        "id": (35, "int64"),
        "operand_ids": (36, "int64*"),
        "control_predecessor_ids": (37, "int64*"),
        "called_computation_ids": (38, "int64*"),
        "backend_config": (43, "bytes"),
        "replica_groups": (49, "ReplicaGroup*"),
        "collective_device_list": (87, "DeviceList"),
    },
    COMPUTATION: {
        "name": (1, "string"),
        "instructions": (2, f"{INSTRUCTION}*"),
        "id": (5, "int64"),
        "root_id": (6, "int64"),
    },
    MODULE: {
        "name": (1, "string"),
        "computations": (3, f"{COMPUTATION}*"),
        "id": (5, "int64"),
        "entry_computation_id": (6, "int64"),
        "input_output_alias": (8, "Aliases"),
        "stack_frame_index": (17, "StackFrames"),
    },
}
"""Message -> field -> number and type; `*` is a repeated field."""


@cache
def module_class() -> Any:
    """Return the class of `HloModuleProto`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # of an extra, only while tracing

    file = descriptor_pb2.FileDescriptorProto(name="tandem_hlo.proto", package=PACKAGE, syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            plain = kind.removesuffix("*")
            one = message.field.add(name=field, number=number)
            one.label = one.LABEL_REPEATED if kind.endswith("*") else one.LABEL_OPTIONAL
            one.type = one.TYPE_MESSAGE if plain in FIELDS else getattr(one, f"TYPE_{plain.upper()}")
            if plain in FIELDS:
                one.type_name = f".{PACKAGE}.{plain}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{MODULE}"))


def read_module(data: bytes) -> Any:
    """Return the module of `data` in the form that older readers know, such as the one in neuronx-cc.

    Ids are numbers from 1 on (XLA writes 64-bit ids now), and replica groups are a field of their own.
    """
    module = module_class()()
    module.ParseFromString(data)
    numbers = count(1)
    instructions = {i.id: next(numbers) for c in module.computations for i in c.instructions}
    computations = {c.id: next(numbers) for c in module.computations}
    for computation in module.computations:
        computation.id, computation.root_id = computations[computation.id], instructions[computation.root_id]
        for one in computation.instructions:
            one.id = instructions[one.id]
            one.replica_groups.extend(one.collective_device_list.replica_groups)
            one.ClearField("collective_device_list")
            one.operand_ids[:] = [instructions[i] for i in one.operand_ids]
            one.control_predecessor_ids[:] = [instructions[i] for i in one.control_predecessor_ids]
            one.called_computation_ids[:] = [computations[i] for i in one.called_computation_ids]
    module.entry_computation_id = computations[module.entry_computation_id]
    module.id = 0
    return module
