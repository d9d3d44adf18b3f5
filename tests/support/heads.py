"""Small EAGLE-3 heads as public tools write them: a config of each writer, and random tensors by a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, DRAFT_VOCAB = 64, 192, 8, 4, 16, 512, 128
"""Sizes of `pico://llama`."""

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "num_hidden_layers": 1,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
FLAT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": DRAFT_VOCAB, **SIZES,
}  # fmt: skip
SPECULATORS: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "draft_vocab_size": DRAFT_VOCAB,
    "target_hidden_size": None, "norm_before_fc": False, "embed_requires_grad": False,
    "speculators_config": {
        "algorithm": "eagle3", "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
    },
    "transformer_layer_config": {"model_type": "llama", **SIZES},
}  # fmt: skip
MODELOPT: dict[str, Any] = {
    **FLAT,
    "eagle_config": {
        "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
        "use_mtp_layernorm": False, "next_layer_regular": True,
    },
}  # fmt: skip
ANGELSLIM: dict[str, Any] = {**FLAT, "architectures": ["Eagle3LlamaForCausalLM"], "target_model_type": "llama"}
P_EAGLE: dict[str, Any] = {
    **SPECULATORS, "architectures": ["PEagleDraftModel"], "speculators_model_type": "peagle", "mask_token_id": 1,
    "norm_before_residual": False, "transformer_layer_config": {"model_type": "llama", **SIZES, "num_hidden_layers": 3},
}  # fmt: skip
AMAZON: dict[str, Any] = {**FLAT, "ptd_token_id": 3, "num_hidden_layers": 3}
SAFEAILAB: dict[str, Any] = {**FLAT, "architectures": ["LlamaForCausalLM"]}


@dataclass(frozen=True)
class Parts:
    """The tensors of a head: the number of taps (0: no fc) and optional ones, by the names of their owners.

    `layers` more than one, and `mask_hidden`, are of a P-EAGLE head.
    """

    taps: int = 3
    layers: int = 1
    mask_hidden: bool = False
    layer: str = "midlayer."
    options: tuple[str, ...] = ()
    draft_vocab: int | None = DRAFT_VOCAB
    lm_head: bool = True
    hidden_norm: bool = True


def tensors(parts: Parts, seed: int = 0) -> dict[str, Tensor]:  # noqa: C901 - one line for each optional tensor
    """Return a head's tensors under public names."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    q, kv, width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, parts.taps * HIDDEN
    attention = {"q": (q, 2 * HIDDEN), "k": (kv, 2 * HIDDEN), "v": (kv, 2 * HIDDEN), "o": (HIDDEN, q)}
    own = {f"self_attn.{name}_proj.weight": matrix(*shape) for name, shape in attention.items()}
    own |= {f"mlp.{name}_proj.weight": matrix(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    own["mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    norms = ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if parts.hidden_norm else ()))
    own |= {f"{name}.weight": norm(HIDDEN) for name in norms}
    if "qk_norm" in parts.options:
        own |= {f"self_attn.{name}_norm.weight": norm(HEAD_DIM) for name in "qk"}
    if "bias" in parts.options:
        own |= {f"self_attn.{n}_proj.bias": torch.randn(s[0], generator=generator) * 0.3 for n, s in attention.items()}
    found = {f"{parts.layer}{name}": tensor for name, tensor in own.items()} | {"norm.weight": norm(HIDDEN) * 3}
    if parts.taps:
        found["fc.weight"] = matrix(HIDDEN, width)
    if "norm_before_fc" in parts.options:
        found["input_norm.weight"] = norm(width)
    if "fc_norm" in parts.options:
        found |= {f"fc_norm.{tap}.weight": norm(HIDDEN) for tap in range(parts.taps)}
    if parts.lm_head:
        found["lm_head.weight"] = matrix(parts.draft_vocab or VOCAB, HIDDEN)
    if parts.mask_hidden:
        found["mask_hidden"] = torch.randn(1, 1, width, generator=generator)
    for layer in range(1, parts.layers):
        found |= {f"layers.{layer}.{name}": tensor for name, tensor in plain_layer(generator).items()}
    return found | (maps(parts.draft_vocab) if parts.draft_vocab else {})


def plain_layer(generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of a decoder's layer without norms of heads."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {"self_attn.q": (q, HIDDEN), "self_attn.k": (kv, HIDDEN), "self_attn.v": (kv, HIDDEN)}
    sizes |= {"self_attn.o": (HIDDEN, q), "mlp.gate": (INTERMEDIATE, HIDDEN), "mlp.up": (INTERMEDIATE, HIDDEN)}
    sizes["mlp.down"] = (HIDDEN, INTERMEDIATE)
    found = {
        f"{name}_proj.weight": torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in sizes.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{name}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    return found


def maps(size: int) -> dict[str, Tensor]:
    """Return `d2t` and `t2d` of an ascending vocabulary that is spread over the target's."""
    ids = torch.linspace(2, VOCAB - 1, size).long().unique()
    marked = torch.zeros(VOCAB, dtype=torch.bool)
    marked[ids] = True
    return {"d2t": ids - torch.arange(size), "t2d": marked}


def shapes(parts: Parts) -> dict[str, Sequence[int]]:
    """Return the shapes of a head's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors(parts).items()}


def write_head(root: Path, config: dict[str, Any], parts: Parts, **changes: Any) -> Path:
    """Write a head's folder; `changes` are tensors that it has in addition, or None for one that it lacks."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    found = tensors(parts) | changes
    save_file({n: t for n, t in found.items() if t is not None}, root / "model.safetensors", {"format": "pt"})
    return root
