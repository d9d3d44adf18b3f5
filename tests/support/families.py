"""Pairs of every family as they occur in the wild: configs, weights in parts, forms of tokenizers."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipeline.models.rope import in_both_layouts

MODERN = int(transformers.__version__.split(".")[0]) >= 5

TEXT = (
    "The quick brown fox jumps over the lazy dog. A model reads tokens and writes the next one; a draft guesses.\n"
    "def add(first, second):\n    return first + second\nWhat is 12 + 345? Numbers, words and 'quotes' in one line.\n"
)
PROMPTS = (
    "The quick brown fox",
    "def add(a, b):",
    "What is 12 + 3?",
    "a",
    "A model reads tokens, and 'quotes' é",
    "numbers words lines",
    "jumps over",
)
CHAT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}"
    "{%- if add_generation_prompt %}{{ bos_token + '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


CLASSES = {
    "Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig", "Llama4": "Llama4TextConfig",
    "Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig",
}  # fmt: skip
"""Names of config classes that are not the model's."""

YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
}  # fmt: skip
LONG: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0, 3.5, 4.0, 5.0], "long_factor": [2.0] * 6,
    },
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MIXTURE = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True, "head_dim": 16,
}  # fmt: skip
SHARED_EXPERT = MIXTURE | {"mlp_only_layers": [2], "shared_expert_intermediate_size": 48}
GPT_OSS = {
    "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5,
    "rope_parameters": YARN | {"truncate": False},
}  # fmt: skip
GRANITE4 = GRANITE | {
    "layer_types": ["attention"] * 3, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 80,
    "mamba_n_heads": 4,
}  # fmt: skip
GEMMA4 = {
    "head_dim": 12, "global_head_dim": 20, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "sliding_window": 6, "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
EXPERTS4 = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48}
GEMMA4_SMALL = GEMMA4 | {
    "num_hidden_layers": 6, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "attention_k_eq_v": False,
    "layer_types": GEMMA4["layer_types"] * 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 400,
}  # fmt: skip
LLAMA4 = {
    "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size_mlp": 80,
    "no_rope_layers": [1, 0, 1], "moe_layers": [0, 2], "tie_word_embeddings": False,
}  # fmt: skip
DELTA_NET = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
GEMMA = {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 3}


@dataclass(frozen=True)
class Family:
    """One pair: a transformers class, what its config changes, the form of its tokenizer, and its draft."""

    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "json"
    draft: dict[str, Any] | None = None
    """Changes of the draft's config against the target's; None: derived from the target's first layer."""
    saved: torch.dtype = torch.float32
    derive: tuple[int, ...] = (0,)
    eos: list[int] | None = None


FAMILIES = {
    "llama": Family(
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
        "json-jinja",
        draft={"num_hidden_layers": 1, "tie_word_embeddings": False},
        saved=torch.bfloat16,
        eos=[2, 7, 9],
    ),
    "mistral": Family(
        "Mistral",
        {"head_dim": 24, "sliding_window": None, "tie_word_embeddings": False},
        "sentencepiece",
        draft={"num_hidden_layers": 1},
    ),
    "qwen2": Family(  # padded as the small and the large Qwen2.5 are: the draft's vocabulary is the smaller one
        "Qwen2",
        {"vocab_size": 416, "tie_word_embeddings": False, "num_key_value_heads": 1},
        "vocab-merges",
        draft={"vocab_size": 380, "num_hidden_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-padded-draft": Family(
        "Qwen2",
        {"vocab_size": 380, "tie_word_embeddings": False},
        "json",
        draft={"vocab_size": 416, "num_hidden_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": Family("Qwen3", {"head_dim": 20, "tie_word_embeddings": False}, "json-config"),
    "smollm3": Family("SmolLM3", {"num_hidden_layers": 4}, "json-config"),
    "granite": Family("Granite", GRANITE, "json-config"),
    "olmo2": Family("Olmo2", {}, "json-config"),
    "olmo3": Family(  # windows that every prompt passes, and a draft of layers of both kinds
        "Olmo3",  # with one theta: 4.57 knows no other one for layers with a window
        {"num_hidden_layers": 4, "sliding_window": 5, "rope_scaling": YARN | {"rope_theta": 5e5}},
        "json-config",
        derive=(0, 3),
    ),
    "glm4": Family("Glm4", {"head_dim": 16}, "json-config", draft={"num_hidden_layers": 1}, eos=[2]),
    "phi4-mini": Family("Phi3", LONG, "json-config", saved=torch.bfloat16),
    "ministral3": Family("Ministral3", {"head_dim": 16}, "json-jinja"),
    "qwen2-moe": Family("Qwen2Moe", SHARED_EXPERT, "json-config", derive=(0, 1)),
    "qwen3-moe": Family("Qwen3Moe", MIXTURE | {"mlp_only_layers": [1]}, "json-config", derive=(0, 1)),
    "olmoe": Family("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}, "json-config"),
    "mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "json-config"),
    "gpt-oss": Family("GptOss", GPT_OSS, "json-config", saved=torch.bfloat16, derive=(0, 1)),
    "granite-moe": Family("GraniteMoe", GRANITE | {"num_local_experts": 4}, "json-config"),
    "granite4": Family("GraniteMoeHybrid", GRANITE4 | {"position_embedding_type": "rope"}, "json-config"),
    "granite4-nope": Family("GraniteMoeHybrid", GRANITE4, "json-config", saved=torch.bfloat16, derive=(0, 1)),
    "gemma2": Family("Gemma2", GEMMA, "json-config"),
    "gemma3": Family("Gemma3", GEMMA | {"sliding_window_pattern": 2}, "json-config", draft={"num_hidden_layers": 2}),
    "gemma4": Family("Gemma4", GEMMA4, "json-config", derive=(0, 2)),
    "gemma4-experts": Family("Gemma4", GEMMA4 | EXPERTS4, "json-config", saved=torch.bfloat16, derive=(0, 2)),
    "gemma4-small": Family(  # the last layers share keys and values, in the draft too
        "Gemma4",
        GEMMA4_SMALL,
        "json-config",
        draft={
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "llama4": Family("Llama4", LLAMA4, "json-config", saved=torch.bfloat16, derive=(0, 1)),
    "qwen3-next": Family("Qwen3Next", DELTA_NET | SHARED_EXPERT, "json-config", derive=(0, 3)),
    "qwen3.5": Family("Qwen3_5", DELTA_NET, "json-config", derive=(0, 3)),
    "qwen3.5-moe": Family(  # a draft with a recurrent state of its own
        "Qwen3_5Moe",
        DELTA_NET | SHARED_EXPERT,
        "json-config",
        draft={"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "smollm": Family(
        "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, "json-config", saved=torch.bfloat16
    ),
}


def write_pair(spec: Family, root: Path, seed: int = 3) -> dict[str, Any]:
    """Save target and draft below `root`; returns the recipe's `draft` section."""
    target = random_model(spec, spec.changes, seed=seed)
    _save(target, root / "target", spec)
    write_tokenizer(root / "target", spec.tokenizer)
    if spec.draft is None:
        return {"derive": {"from": "target", "layers": list(spec.derive)}}
    draft = random_model(spec, spec.changes | spec.draft, seed=seed + 1)
    _resemble(draft, target)
    _save(draft, root / "draft", spec)
    write_tokenizer(root / "draft", spec.tokenizer)
    return {"source": "./draft"}


def random_model(spec: Family, changes: dict[str, Any], seed: int) -> Any:
    """A model of a family with random weights, by transformers."""
    name = CLASSES.get(spec.model, f"{spec.model}Config")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    fields, known = SIZES | changes, getattr(transformers, name)
    if not MODERN:  # whose classes read no `rope_parameters`
        fields = in_both_layouts(fields | {"model_type": known.model_type}, SIZES["max_position_embeddings"])
        fields.pop("model_type")
    config = known(**fields)
    model = getattr(transformers, f"{spec.model}ForCausalLM")(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scalars = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
        for name, parameter in (*model.named_parameters(), *scalars):
            later = name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name
            noise = torch.randn(parameter.shape, generator=generator) * (0.03 if later else 0.18)
            parameter.copy_(noise + (parameter.ndim == 1 and "bias" not in name and "A_log" not in name))
    return model


def _resemble(draft: Any, target: Any) -> None:
    """Give a draft the target's tensors, where both have them: it then guesses right now and then."""
    ours, theirs = draft.state_dict(), target.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            if name not in theirs or theirs[name].shape[1:] != tensor.shape[1:]:
                continue
            rows = min(len(tensor), len(theirs[name]))
            tensor[:rows] = theirs[name][:rows]


def _save(model: Any, root: Path, spec: Family) -> None:
    model = model.to(spec.saved)
    if spec.eos:
        model.generation_config.eos_token_id = spec.eos
    model.save_pretrained(root, max_shard_size="100KB")
    assert (root / "model.safetensors.index.json").is_file()


def write_tokenizer(root: Path, form: str) -> None:
    """One of the forms in which checkpoints carry their tokenizer; 330 to 360 ids."""
    root.mkdir(parents=True, exist_ok=True)
    if form == "sentencepiece":
        (root / "tokenizer.model").write_bytes(_sentencepiece())
        added = {"340": {"content": "<|im_start|>", "special": True}, "341": {"content": "<|im_end|>", "special": True}}
        _config(root, tokenizer_class="LlamaTokenizer", add_bos_token=True, added_tokens_decoder=added)
        return
    _byte_level().save(str(root / "tokenizer.json"))
    if form == "vocab-merges":
        model = json.loads((root / "tokenizer.json").read_text())["model"]
        (root / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (root / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        (root / "tokenizer.json").unlink()
        _config(root, tokenizer_class="Qwen2Tokenizer", chat_template=CHAT)
    elif form == "json-jinja":
        _config(root, tokenizer_class="PreTrainedTokenizerFast")
        (root / "chat_template.jinja").write_text(CHAT)
    elif form == "json-config":
        template = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "no"}]
        _config(root, tokenizer_class="PreTrainedTokenizerFast", chat_template=template)


def _config(root: Path, **fields: Any) -> None:
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>"}
    (root / "tokenizer_config.json").write_text(json.dumps(names | fields))


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _sentencepiece() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20), model_writer=out, vocab_size=340, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return out.getvalue()
