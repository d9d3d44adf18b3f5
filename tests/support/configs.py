"""A small `config.json`, and rotary embeddings for it."""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma4_text": {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64, "global_head_dim": 16},
    **{f: {"full_attention_interval": 2, "head_dim": 16} for f in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4},
}
"""Fields without which a small config of a family is refused."""


def small(family: str) -> dict[str, Any]:
    """A small config of a family that reads it."""
    return SMALL | OF_FAMILY.get(family, {})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 9.0],
    "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
