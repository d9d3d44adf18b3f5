"""Checkpoints in the forms in which they are published: each gives the logits of transformers' model of that folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.models.caches import empty_caches
from pipeline.models.parallel import Seams
from pipeline.models.weights import EMBEDDING, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_weight
from pipeline.sources.weights import weights
from pipeline.speculation.model import Model
from support.checkpoints import opened, refusal

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TOKENS = torch.arange(60).view(2, 30) + 3


def our_logits(checkpoint: Checkpoint) -> Tensor:
    """Logits of the tokens by the decoder, with the checkpoint's weights in float32."""
    config, refs = checkpoint.config, weights(checkpoint)
    loaded = {spec.name: read_weight(refs, spec).float() for spec in weight_specs(config)}
    rows, count = TOKENS.shape
    model = Model(config, loaded, empty_caches(config, rows, 65, torch.float32), Seams())
    positions = torch.arange(count).expand(rows, count)
    with torch.no_grad():
        hidden = model.hidden(TOKENS, positions, torch.ones(rows, dtype=torch.bool), 64)
        return model.logits(hidden.last_BTH)


def saved(model: Any, root: Path, **options: Any) -> Tensor:
    """Save a random model; returns its logits."""
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
        model.save_pretrained(root, **options)
        whole = model.eval().float()
        is_llama4 = isinstance(model, transformers.Llama4ForConditionalGeneration)  # a call of the whole fails in 5.24
        return (whole.language_model if is_llama4 else whole)(TOKENS).logits


def close(got: Tensor, want: Tensor) -> None:
    error = (got - want).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


def multimodal(kind: str, **changes: Any) -> Any:
    """A random multimodal model with a text part of the sizes above."""
    if TEXTS.get(kind, kind) not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no class for {kind}")
    if kind == "gemma3":
        text = SMALL | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8}
        vision = VISION | {"model_type": "siglip_vision_model"}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=95, boi_token_index=93,
            eoi_token_index=94, **changes,
        )  # fmt: skip
        return transformers.Gemma3ForConditionalGeneration(config)
    if kind == "llama4":
        text = SMALL | {"num_local_experts": 4, "intermediate_size_mlp": 24, "no_rope_layers": [1, 0, 1]}
        vision = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        config = transformers.Llama4Config(
            text_config=text, vision_config=vision, image_token_index=95, boi_token_index=93, eoi_token_index=94,
            **changes,
        )  # fmt: skip
        return transformers.Llama4ForConditionalGeneration(config)
    if kind.startswith("qwen3_5"):
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[kind]
        text = SMALL | DELTA_NET | (experts | {"shared_expert_intermediate_size": 24} if "moe" in kind else {})
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **changes)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)
    text = SMALL | {"model_type": {"mistral3": "mistral"}.get(kind, kind), "sliding_window": None}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=VISION | {"model_type": "pixtral", "head_dim": 8}, image_token_index=95,
        **changes,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


TEXTS = {
    "llama4": "llama4_text",
    "gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
}  # fmt: skip
"""Families of the text parts, where they are not the kind."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {}),
    "mistral3": ("mistral3", {"tie_word_embeddings": False}),
    "tied": ("mistral3", {}),
    "llama4": ("llama4", {"tie_word_embeddings": False}),
    "ministral3": ("ministral3", {}),
    "qwen3.5": ("qwen3_5", {}),
    "qwen3.5-moe": ("qwen3_5_moe", {}),
}


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("older", [False, True])
def test_text_part_of_a_multimodal_model(tmp_path: Path, kind: str, changes: Any, older: bool) -> None:
    """Names of transformers 5 (`model.language_model.`) and of 4 (`language_model.model.`)."""
    want = saved(multimodal(kind, **changes), tmp_path / "m")
    if older:
        rename(
            tmp_path / "m", {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
        )
    checkpoint = opened("m", tmp_path)
    assert checkpoint.config.family == TEXTS.get(kind, kind)
    assert "text_config" not in checkpoint.config_json
    close(our_logits(checkpoint), want)


def rename(root: Path, starts: dict[str, str]) -> None:
    tensors = {}
    for name, tensor in load_file(root / "model.safetensors").items():
        for old, new in starts.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        tensors[name] = tensor
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def test_multimodal_model_with_another_text_part_is_refused(tmp_path: Path) -> None:
    saved(multimodal("gemma3"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma4_text"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert 'text_config.model_type="gemma4_text": not supported in a model of type gemma3' in refusal("m", tmp_path)


def test_end_of_sequence_of_a_multimodal_model_is_that_of_the_whole(tmp_path: Path) -> None:
    saved(multimodal("gemma3", eos_token_id=[1, 7]), tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink(missing_ok=True)
    assert opened("m", tmp_path).config.eos_ids == (1, 7)


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | changes)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_and_heads(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    saved(llama(tie_word_embeddings=tied).to(dtype), tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    found = weights(opened("m", tmp_path))
    assert ("lm_head.weight" in found) != tied
    with torch.no_grad():
        close(our_logits(opened("m", tmp_path)), model(TOKENS).logits)


def test_shards_by_an_index(tmp_path: Path) -> None:
    want = saved(llama(), tmp_path / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    close(our_logits(opened("m", tmp_path)), want)


@pytest.mark.parametrize("prefix", ["model.layers.{}.self_attn.", "model."])
def test_buffers_of_rotary_embeddings_have_no_effect(tmp_path: Path, prefix: str) -> None:
    """Checkpoints of older tools have them; the config defines the frequencies."""
    want = saved(llama(), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    buffers = {f"{prefix.format(layer)}rotary_emb.inv_freq": torch.rand(4) for layer in range(3)}
    save_file(tensors | buffers, tmp_path / "m" / "model.safetensors")
    close(our_logits(opened("m", tmp_path)), want)


def test_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    want = saved(llama(tie_word_embeddings=True), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}, tmp_path / "m" / "model.safetensors")
    close(our_logits(opened("m", tmp_path)), want)


def test_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert "missing weight lm_head.weight" in refusal("m", tmp_path)


@pytest.mark.parametrize("family", ["Phi3", "Glm4"])
def test_fused_projections(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL, bos_token_id=1, eos_token_id=2)
    want = saved(getattr(transformers, f"{family}ForCausalLM")(config), tmp_path / "m")
    close(our_logits(opened("m", tmp_path)), want)
