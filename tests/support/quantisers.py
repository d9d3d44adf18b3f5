"""Checkpoints as quantising tools write them: by compressed-tensors and bitsandbytes, others from their formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from support.checkpoints import CONFIG, random_weights, write_checkpoint

Tensors = dict[str, Tensor]
F8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Tool:
    """A tool: what its checkpoints have in `quantization_config`, and a matrix as its tensors and as its values."""

    config: dict[str, Any]
    pack: Callable[[Tensor, torch.Generator], tuple[Tensors, Tensor]]
    sizes: dict[str, int] = field(default_factory=dict)
    """Config keys of a model whose matrices the tool can store."""


def quantised_modules(weights: Mapping[str, Tensor]) -> list[str]:
    """Modules that tools quantise: the projections of the layers."""
    return [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]


def write_quantised(root: Path, tool: Tool, *, seed: int = 0, files: int = 1, **changes: Any) -> Tensors:
    """Write a checkpoint of a tool; returns the values of its weights, float32."""
    generator = torch.Generator().manual_seed(seed)
    changes = tool.sizes | changes
    weights = random_weights(CONFIG | changes, torch.bfloat16, seed)
    stored, values = dict(weights), {name: weight.float() for name, weight in weights.items()}
    for module in quantised_modules(weights):
        tensors, values[f"{module}.weight"] = tool.pack(stored.pop(f"{module}.weight").float(), generator)
        stored |= {f"{module}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    write_checkpoint(root, stored, files=files, **changes, quantization_config=tool.config)
    return values


def bits_of(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers [X, V] as a stream of bits from the lowest on, in int32 words [X, V * bits / 32]."""
    stream = (values.long()[..., None] >> torch.arange(bits)) & 1
    words = stream.flatten(1).unflatten(1, (-1, 32)) << torch.arange(32)
    whole = words.sum(dim=-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def fp8_blocks(block: tuple[int, int] = (128, 128), scales: torch.dtype = torch.float32) -> Tool:
    """DeepSeek and Qwen: one scale for each block; blocks at the ends are smaller."""

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Tensors, Tensor]:
        rows, columns = (-(-size // edge) for size, edge in zip(weight.shape, block, strict=True))
        scale = torch.empty(rows, columns)
        spread = torch.empty_like(weight)
        for i in range(rows):
            for j in range(columns):
                area = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scale[i, j] = weight[area].abs().max() / 448
                if scales == torch.float8_e8m0fnu:
                    scale[i, j] = 2.0 ** torch.ceil(torch.log2(scale[i, j]))
                spread[area] = scale[i, j].to(scales).float()
        values = (weight / spread).to(F8)
        return {"weight": values, "weight_scale_inv": scale.to(scales)}, values.float() * spread

    return Tool({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}, pack)


def fp8_tensor(shape: tuple[int, ...] = (1,), name: str = "weight_scale") -> Tool:
    """AutoFP8 and Mistral: one scale for a matrix, and one for its activations."""

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Tensors, Tensor]:
        scale = (weight.abs().max() / 448).bfloat16().float()
        values = (weight / scale).to(F8)
        tensors = {"weight": values, name: scale.bfloat16().view(shape), "input_scale": torch.tensor([0.5])}
        return tensors, values.float() * scale

    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return Tool(config, pack)


def gptq(bits: int = 4, group: int = 16, *, version: int = 1, order: bool = False) -> Tool:
    """AutoGPTQ: values in words along the inputs; zero points minus 1 in words along the outputs."""

    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        groups, mask = columns // group, (1 << bits) - 1
        group_of = torch.arange(columns) // group
        if order:
            group_of = group_of[torch.randperm(columns, generator=generator)]
        scale = (torch.rand(groups, rows, generator=generator) / mask + 0.01).half()
        zeros = torch.randint(0, mask + 1, (groups, rows), generator=generator)  # 0 is stored as all ones
        values = torch.randint(0, mask + 1, (columns, rows), generator=generator)
        stored = (zeros - 1) & mask if version == 1 else zeros
        tensors = {
            "qweight": bits_of(values.T, bits).T,
            "qzeros": bits_of(stored, bits),
            "scales": scale,
            "g_idx": group_of.int(),
        }
        return tensors, ((values - zeros[group_of]).float() * scale.float()[group_of]).T

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
    return Tool(config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), pack)


def awq(group: int = 16) -> Tool:
    """AutoAWQ, layout gemm: eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def pack(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        scale = (torch.rand(columns // group, rows, generator=generator) / 15 + 0.01).half()
        zeros = torch.randint(0, 16, (columns // group, rows), generator=generator)
        values = torch.randint(0, 16, (columns, rows), generator=generator)
        tensors = {"qweight": _awq_words(values), "qzeros": _awq_words(zeros), "scales": scale}
        spread = torch.arange(columns) // group
        return tensors, ((values - zeros[spread]).float() * scale.float()[spread]).T

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Tool(config | {"modules_to_not_convert": None}, pack)


def _awq_words(values: Tensor) -> Tensor:
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return bits_of(values.unflatten(1, (-1, 8))[..., order].flatten(1), 4)


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Tool:
    """compressed-tensors: its own compressor, with scales that its own observers would find."""
    inputs = None if activations is None else QuantizationArgs(**activations)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    compressor = BaseCompressor.get_value_from_registry(form)

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Tensors, Tensor]:
        weight = weight.bfloat16()
        scale, zeros = calculate_qparams(*_limits(weight, args), args)
        state = {"weight": weight, "weight_scale": scale.bfloat16()}
        if not args.symmetric:
            state["weight_zero_point"] = zeros.to(torch.int8)
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    group = {
        "targets": ["Linear"],
        "weights": json.loads(args.model_dump_json()),
        "input_activations": None if inputs is None else json.loads(inputs.model_dump_json()),
        "output_activations": None,
    }
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return Tool(config | {"quantization_status": "compressed", "config_groups": {"group_0": group}}, pack)


def _limits(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest values that share a scale."""
    if args.strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if args.strategy == "block":
        height, width = args.block_structure or [1, 1]
        tiles = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        return tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    return groups.amin(dim=-1), groups.amax(dim=-1)


def bnb_config(**changes: Any) -> dict[str, Any]:
    """A `quantization_config` of 4 bits as transformers writes it."""
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
    }  # fmt: skip
    config |= changes
    return config | {f"_{key}": config[key] for key in ("load_in_4bit", "load_in_8bit") if f"_{key}" not in changes}


def bnb_4(kind: str, blocksize: int = 64, dtype: torch.dtype = torch.bfloat16, *, double: bool = False) -> Tool:
    """bitsandbytes, 4 bits: its own functions. Rows are whole blocks."""

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Tensors, Tensor]:
        codes, state = quantize_4bit(weight.to(dtype), blocksize=blocksize, compress_statistics=double, quant_type=kind)
        beside = {f"weight.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": codes, **beside}, dequantize_4bit(codes, state).float()

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    return Tool(bnb_config(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double), pack, sizes)


def bnb_8() -> Tool:
    """bitsandbytes, LLM.int8: its own functions."""

    def pack(weight: Tensor, _: torch.Generator) -> tuple[Tensors, Tensor]:
        values, scale, _ = int8_vectorwise_quant(weight.half())
        tensors = {"weight": values, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, int8_vectorwise_dequant(values, scale)

    return Tool(bnb_config(load_in_4bit=False, load_in_8bit=True), pack)


DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token"}
TOOLS: dict[str, Tool] = {
    "fp8 blocks": fp8_blocks((16, 32)),
    "fp8 blocks that end early": fp8_blocks((24, 20)),
    "fp8 blocks of 128": fp8_blocks(),
    "fp8 blocks, exponents": fp8_blocks((16, 16), torch.float8_e8m0fnu),
    "fp8 tensor": fp8_tensor(),
    "fp8 tensor, scalar": fp8_tensor((), "weight_scale_inv"),
    "gptq 4": gptq(),
    "gptq 4, version 2": gptq(version=2),
    "gptq 4, order": gptq(order=True),
    "gptq 8": gptq(8, 32),
    "gptq 3": gptq(3, 32),
    "gptq 2": gptq(2),
    "awq": awq(),
    "w8a8 fp8": compressed(
        "float-quantized", {"type": "float", "strategy": "channel"}, DYNAMIC | {"type": "float"}
    ),
    "fp8, one scale": compressed("naive-quantized", {"type": "float", "strategy": "tensor"}),
    "fp8, blocks": compressed(
        "float-quantized", {"type": "float", "strategy": "block", "block_structure": [16, 32]},
        DYNAMIC | {"type": "float"},
    ),
    "w8a8 int8": compressed("int-quantized", {"strategy": "channel"}, DYNAMIC),
    "w8a8 int8, zero points": compressed("int-quantized", {"strategy": "channel", "symmetric": False}, DYNAMIC),
    "w4a16": compressed("pack-quantized", {"num_bits": 4, "group_size": 16, "strategy": "group"}),
    "w4a16, zero points": compressed(
        "pack-quantized", {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": False}
    ),
    "w4a16, rows": compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "w3a16, zero points": compressed(
        "pack-quantized", {"num_bits": 3, "group_size": 32, "strategy": "group", "symmetric": False}
    ),
    "w8a16": compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "nf4": bnb_4("nf4"),
    "nf4, double": bnb_4("nf4", double=True),
    "nf4, blocks of 128, double": bnb_4("nf4", 128, torch.float16, double=True),
    "nf4, blocks of 32": bnb_4("nf4", 32, torch.float32),
    "fp4": bnb_4("fp4"),
    "fp4, double": bnb_4("fp4", 128, double=True),
    "bitsandbytes int8": bnb_8(),
}  # fmt: skip
