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

from pipeline.models.decoder import hidden_states, logits
from pipeline.models.parallel import Pass, Seams, attend_up_to, plan_writes
from pipeline.models.weights import EMBEDDING, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from support.checkpoints import opened, refusal

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TOKENS = torch.arange(60).view(2, 30) + 3


def our_logits(checkpoint: Checkpoint) -> Tensor:
    """Logits of the tokens by the decoder, with the checkpoint's weights in float32."""
    config, refs = checkpoint.config, weights(checkpoint)
    loaded = {spec.name: read_tensor(refs[spec.name]).float() for spec in weight_specs(config)}
    rows, count = TOKENS.shape
    positions = torch.arange(count).expand(rows, count)
    state = {
        f"{part}.{layer}": torch.zeros(rows, config.kv_heads, 65, config.head_dim)
        for layer in range(config.layers) for part in ("k", "v")
    }  # fmt: skip
    writes = plan_writes(state, torch.arange(rows), positions, torch.ones(rows, count, dtype=torch.bool))
    with torch.no_grad():
        hidden = hidden_states(
            config, loaded, Seams(), TOKENS, Pass(positions, state, writes, attend_up_to(positions, 64))
        )
        return logits(config, loaded, Seams(), hidden.last_BTH)


def saved(model: Any, root: Path, **options: Any) -> Tensor:
    """Save a random model; returns its logits."""
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
        model.save_pretrained(root, **options)
        return model.eval().float()(TOKENS).logits


def close(got: Tensor, want: Tensor) -> None:
    error = (got - want).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


def multimodal(kind: str, **changes: Any) -> Any:
    """A random multimodal model with a text part of the sizes above."""
    if kind == "gemma3":
        text = SMALL | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8}
        vision = VISION | {"model_type": "siglip_vision_model"}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=95, boi_token_index=93,
            eoi_token_index=94, **changes,
        )  # fmt: skip
        return transformers.Gemma3ForConditionalGeneration(config)
    text = SMALL | {"model_type": {"mistral3": "mistral"}.get(kind, kind), "sliding_window": None}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=VISION | {"model_type": "pixtral", "head_dim": 8}, image_token_index=95,
        **changes,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {}),
    "mistral3": ("mistral3", {"tie_word_embeddings": False}),
    "tied": ("mistral3", {}),
    "ministral3": ("ministral3", {}),
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
    assert checkpoint.config.family == {"gemma3": "gemma3_text", "mistral3": "mistral"}.get(kind, kind)
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
