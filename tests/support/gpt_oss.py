"""The same random gpt-oss as a checkpoint in bfloat16 and in MXFP4, as their writers name and store tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
METHOD = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""`quantization_config` as the published checkpoints have it."""


def write_both(root: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write `root/bfloat16` and `root/mxfp4`; return their tensors."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES)
    model = transformers.GptOssForCausalLM(config)
    plain, packed = {}, {}
    for name, tensor in model.state_dict().items():
        noise = (torch.randn(tensor.shape) * 0.2 + (tensor.ndim == 1 and name.endswith("norm.weight"))).bfloat16()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            exponents = torch.randint(120, 126, blocks.shape[:3], dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
            noise = convert_moe_packed_tensors(blocks, exponents, dtype=torch.bfloat16)
            assert noise.shape == tensor.shape
        else:
            packed[name] = noise
        plain[name] = noise
    as_json = json.loads(config.to_json_string(use_diff=False)) | {"rope_scaling": SIZES["rope_scaling"]}
    del as_json["rope_parameters"]
    for folder, tensors, more in (("bfloat16", plain, {}), ("mxfp4", packed, {"quantization_config": METHOD})):
        (root / folder).mkdir(parents=True)
        save_file(tensors, root / folder / "model.safetensors", {"format": "pt"})
        fields = as_json | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]} | more
        (root / folder / "config.json").write_text(json.dumps(fields))
    return plain, packed
