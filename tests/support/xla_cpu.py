"""HLO modules on XLA's CPU client through jaxlib, on as many devices as a module has ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

DEVICES = 8


@cache
def client():
    """The CPU client, with devices for every number of ranks that tests use."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    return jax.devices()[0].client


class Executable:
    """A compiled HLO module; every rank has parameters and results of its own."""

    def __init__(self, data: bytes, ranks: int = 1) -> None:
        import numpy as np
        from jaxlib import xla_client as xc

        self.ranks = ranks
        options = xc.CompileOptions()
        options.num_replicas, options.num_partitions = ranks, 1
        options.device_assignment = xc.DeviceAssignment.create(np.arange(ranks).reshape(ranks, 1))
        build = options.executable_build_options
        build.debug_options.xla_backend_optimization_level = 0
        build.debug_options.xla_llvm_disable_expensive_passes = True
        self.devices = client().devices()[:ranks]
        self.loaded = client().compile_and_load(runnable(data), xc.DeviceList(tuple(self.devices)), options)

    def __call__(self, parameters: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Run; parameters and results by rank."""
        arguments = [self._array([rank[i] for rank in parameters]) for i in range(len(parameters[0]))]
        results = self.loaded.execute_sharded(arguments).disassemble_into_single_device_arrays()
        return [[_tensor(result[rank]) for result in results] for rank in range(self.ranks)]

    def _array(self, parts: Sequence[torch.Tensor]):
        """One array whose shard on each device is that rank's tensor."""
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        sharding = NamedSharding(Mesh(np.array(self.devices), ("rank",)), PartitionSpec("rank"))
        shape = (parts[0].shape[0] * self.ranks, *parts[0].shape[1:])
        shards = [jax.device_put(_numpy(part), device) for part, device in zip(parts, self.devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def runnable(data: bytes) -> str:
    """The module as StableHLO in which the compiler's top-k is an operator that XLA's CPU has."""
    from jaxlib import _jax
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
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(data))
        calls = []

        def find(operation):
            if operation.name == "stablehlo.custom_call":
                calls.append(operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(find)
        for call in calls:
            _replace_top_k(ir, call)
        return str(module)


def _replace_top_k(ir, call):
    target = ir.StringAttr(call.attributes["call_target_name"]).value
    if target != "AwsNeuronTopK":
        raise AssertionError(f"XLA's CPU does not run {target}")
    count = int(ir.StringAttr(call.attributes["backend_config"]).value)
    operand = call.operands[0]
    shape = [*ir.RankedTensorType(operand.type).shape[:-1], count]
    kinds = [ir.RankedTensorType(operand.type).element_type, ir.IntegerType.get_signless(32)]
    types = [ir.RankedTensorType.get(shape, kind) for kind in kinds]
    with ir.InsertionPoint(call):
        k = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), count)
        top = ir.Operation.create("chlo.top_k", types, [operand], {"k": k})
        unsigned = ir.RankedTensorType.get(shape, ir.IntegerType.get_unsigned(32))
        indices = ir.Operation.create("stablehlo.convert", [unsigned], [top.results[1]]).results[0]
    made = [top.results[0], indices]
    if len(call.results) == 1:
        for use in list(call.results[0].uses):
            element = use.owner
            element.results[0].replace_all_uses_with(made[ir.IntegerAttr(element.attributes["index"]).value])
            element.erase()
    else:
        for old, new in zip(call.results, made, strict=True):
            old.replace_all_uses_with(new)
    call.erase()


def _numpy(tensor: torch.Tensor):
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array) -> torch.Tensor:
    import numpy as np

    found = np.array(array)
    if found.dtype.name == "bfloat16":
        return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(found)
