"""Fake of `generate_hlo`, from NxD's use of it and the ModelBuilder V2 documents; with torch-xla where it is there."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch_neuronx.proto import metaneff_pb2
from torch_neuronx.xla_impl.structure import Flattener, Packer

if find_spec("torch_xla") is not None:
    from torch_neuronx.xla_impl import lower_xla as lowering
else:
    from torch_neuronx.xla_impl import lower_eager as lowering

DTYPES = {5: torch.bool, 2: torch.int32, 10: torch.int64, 12: torch.float16, 1: torch.float32, 14: torch.bfloat16}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
KINDS = {"input": 1, "weight": 3, "state": 2}
XLA_DTYPE_TO_METANEFF_DTYPE = {1: 5, 4: 2, 5: 10, 10: 12, 11: 1, 16: 14}
CALLS: list[dict[str, Any]] = []
"""Keywords of every call, for tests."""

run_hlo = lowering.run_hlo


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
    lowering.begin()
    model, before = func, _tables(func)
    for table, name, tensor in before:
        table[name] = lowering.placeholder(tensor)
    inputs = {name: lowering.placeholder(tensor) for name, tensor in example_inputs.items()}
    weights, states = dict(model.named_parameters()), dict(model.named_buffers())
    versions = {name: tensor._version for name, tensor in states.items()}
    named = {("input", name): tensor for name, tensor in inputs.items()}
    named |= {("weight", name): tensor for name, tensor in weights.items()}
    named |= {("state", name): tensor for name, tensor in states.items()}
    with torch.no_grad():
        results = model(**inputs)
    outputs = [results] if isinstance(results, torch.Tensor) else list(results)
    mutated = [name for name, tensor in states.items() if tensor._version != versions[name]]
    if mutated:
        raise RuntimeError(f"buffers {mutated} are mutated in place, which ModelBuilder V2 does not support")
    after = dict(model.named_buffers())
    replaced = [name for name in states if after[name] is not states[name]]
    results = outputs + [after[name] for name in replaced]
    for name in replaced:
        _set_buffer(model, name, states[name])
    if lowering.__name__.endswith("eager"):
        hlo, order = lowering.lower(named, results, model, replaced)
    else:
        hlo, order = lowering.lower(named, results)
    for table, name, tensor in before:
        table[name] = tensor
    return _artifacts(hlo, order, named, outputs, results[len(outputs) :], replaced)


def _tables(model):
    """Every parameter and buffer: the dictionary that holds it, its name there, itself."""
    tables = [t for module in model.modules() for t in (module._parameters, module._buffers)]
    return [(table, name, tensor) for table in tables for name, tensor in table.items()]


def _set_buffer(model, name, tensor):
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = tensor


def _artifacts(hlo, order, named, outputs, carried, replaced):
    meta = metaneff_pb2.MetaNeff(serialized_graph_def=hlo.SerializeToString())
    for kind, name in order:
        tensor = named[kind, name]
        entry = meta.input_tensors.add(type=KINDS[kind], shape=list(tensor.shape), data_type=NUMBERS[tensor.dtype])
        setattr(entry, "user_input_key" if kind == "input" else "checkpoint_key", name.encode())
    for tensor in outputs + carried:
        meta.output_tensors.add(shape=list(tensor.shape), data_type=NUMBERS[tensor.dtype])
    for place, name in enumerate(replaced):
        if ("state", name) not in order:
            raise RuntimeError(f"buffer {name} is overwritten without being read; its alias has no input")
        meta.output_aliases_to[len(outputs) + place] = order.index(("state", name))
    arguments = [name for kind, name in named if kind == "input"]
    unused = [place for place, name in enumerate(arguments) if ("input", name) not in order]
    indices = {name: place for place, (kind, name) in enumerate(order) if kind == "weight"}
    flattener = Flattener(tuple(range(len(arguments))), unused or None)
    return HloArtifacts(hlo, flattener, Packer(tuple(range(len(outputs))), [], []), meta, weight_name_to_idx=indices)


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


def generate_neff(*arguments, **keywords):
    raise RuntimeError("not part of the fake SDK: Tandem starts neuronx-cc itself")
