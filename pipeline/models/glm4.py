"""GLM-4: norms around attention and the feed-forward network, a rotary embedding of neighbours in half of each head."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.config import ModelConfig, Norms
from pipeline.models.fields import Fields
from pipeline.models.layer_types import cache_limit
from pipeline.models.shared import shared_fields

NORMS = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
EOS = (151329, 151336, 151338)
"""End-of-sequence ids of the class, for a config without."""


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Glm4Config`."""
    config = shared_fields(fields, norms=NORMS, qkv_bias=fields.value("attention_bias"), limits=cache_limit(fields))
    return config if fields.value("eos_token_id") is not None else replace(config, eos_ids=EOS)
