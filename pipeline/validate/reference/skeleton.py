"""transformers' models without the memory of their weights, and our tensors by the names of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.errors import no_string
from pipeline.models.config import ModelConfig
from pipeline.models.quantisation import without_quantisation
from pipeline.models.rope import in_both_layouts
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.weights import EXPERT_NAMES, STACKED, of_experts

SPECIAL = "__float__"
WITH_INITIALIZATION = 5
"""Major version of transformers that has a module of initial values."""

if int(transformers.__version__.split(".")[0]) >= WITH_INITIALIZATION:
    from transformers.initialization import no_init_weights
else:
    from transformers.modeling_utils import no_init_weights

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices of some modules of transformers, and the parts of a checkpoint, as Tandem reads it, that they stack."""


class _WithoutMemory(TorchFunctionMode):
    """Within it, modules allocate no memory for parameters; buffers that are computed have their values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Create empty tensors on the meta device; leave everything else as it is.

        Zeros for a device that is named, or named as none, are of a computed buffer.
        """
        options: dict[str, Any] = dict(kwargs or {})
        if func is torch.empty or (func in (torch.zeros, torch.ones) and "device" not in options):
            options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules without the memory and the random values of their weights."""
    with _WithoutMemory(), no_init_weights():
        yield


def with_floats(value: Any) -> Any:
    """Return a JSON value with the numbers that transformers 5 writes as {"__float__": "Infinity"}: JSON has none."""
    if isinstance(value, Mapping):
        return float(value[SPECIAL]) if set(value) == {SPECIAL} else {k: with_floats(v) for k, v in value.items()}
    return [with_floats(item) for item in value] if isinstance(value, list) else value


def config_of(checkpoint: Checkpoint) -> Any:
    """Return transformers' config of a checkpoint; of a derived draft, with its own layers."""
    named = without_quantisation(in_both_layouts(checkpoint.config_json, checkpoint.config.max_position))
    fields = {key: with_floats(value) for key, value in named.items() if key != "model_type"}
    if len(fields.get("layer_types") or ()) != checkpoint.config.layers:
        fields.pop("layer_types", None)
    fields["num_hidden_layers"] = checkpoint.config.layers
    return transformers.AutoConfig.for_model(checkpoint.config_json["model_type"], **fields)


def for_module(names: Iterable[str], tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a module with parameters `names`, stacked where the module has them as one."""
    no_string(names, "names", "names of parameters")
    found = {name: _of_gated(name, tensors, config) for name in names}
    return {name: _found(ours(name), tensors, config) if tensor is None else tensor for name, tensor in found.items()}


def _of_gated(name: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor | None:
    """Return a parameter that holds several of ours: of a gated delta net, or queries with the gate of attention."""
    base, _, leaf = name.rpartition(".")
    block, _, module = base.rpartition(".")

    def of(*parts: str) -> list[Tensor]:
        return [tensors[f"{block}.{part}.{leaf}"] for part in parts]

    net = config.delta_net
    if config.attention_gate and module == "q_proj":
        return _by_groups(of("q_proj", "q_gate_proj"), config.heads)
    if net is None or not base.startswith("linear_attn."):
        return None
    if module == "conv1d":
        return torch.cat(of("q_conv", "k_conv", "v_conv")).view(-1, 1, net.kernel)
    if module == "in_proj_qkv":
        return torch.cat(of("q_proj", "k_proj", "v_proj"))
    if module == "in_proj_z":
        return of("z_proj")[0]
    parts = {"in_proj_qkvz": ("q_proj", "k_proj", "v_proj", "z_proj"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
    return _by_groups(of(*parts[module]), net.key_heads) if module in parts else None


def _by_groups(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Return one tensor with the rows of all parts, group after group."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def ours(name: str) -> str:
    """Return our name of a parameter: experts have the names of Qwen's checkpoints."""
    name = f".{name}"
    for pattern, new in EXPERT_NAMES:
        name = pattern.sub(new, name)
    return name.removeprefix(".")


def _found(name: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """Return a parameter; of experts, in the layout that checkpoints of this config have."""
    if name in tensors:
        return tensors[name]
    stacked = STACKED.fullmatch(name)
    if stacked is not None:
        base, leaf = stacked["block"], stacked["leaf"]
        count = sum(other.startswith(f"{base}.") and other.endswith(".down_proj.weight") for other in tensors)
        leaf += stacked["end"] or ".weight"
        whole = torch.stack([_found(f"{base}.{expert}.{leaf}", tensors, config) for expert in range(count)])
        if of_experts(config, "interleaved") and leaf.startswith("gate_up_proj"):
            whole = torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2)
        is_turned = of_experts(config, "inputs_first") and not leaf.endswith("bias")
        return whole.transpose(1, 2).contiguous() if is_turned else whole
    block, _, leaf = name.rpartition(".")
    stem, _, fused = block.rpartition(".")
    return torch.cat([tensors[f"{stem}.{part}.{leaf}"] for part in FUSED.get(fused, (fused,))])
