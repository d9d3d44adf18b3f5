"""Fields of `config.json` beside those of the config classes: other names, drafts' own, refused ones. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.field_types import Field, Kind

OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt_oss": {"num_local_experts": "num_experts"},
    "granitemoehybrid": {"layer_types": "layers_block_type"},
    "mixtral": {"num_local_experts": "num_experts"},
    "olmoe": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""Family -> field -> another name under which transformers 5 reads it."""

DRAFT_FIELDS: Mapping[str, Field] = {
    "draft_vocab_size": Field(None, Kind.INT_OR_NULL),
    "target_hidden_size": Field(None, Kind.INT_OR_NULL),
    "shares_embedding": Field(False, Kind.BOOL),
}
"""Fields of drafts, which no class of transformers has."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "compression_config": (),
    "decoder": (),
    "generator": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (),
    "logit_scale": (1,),
    "num_kv_shared_layers": (0,),
    "per_layer_config": ({}, []),
    "pruned_heads": ({},),
    "text_config": (),
    "text_encoder": (),
}
"""Fields of no family that code of transformers or vLLM reads and that change the output, and the values (null apart)
that do not. Every other unknown field is ignored, as transformers ignores it.
"""
