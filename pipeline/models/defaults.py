"""Fields of `config.json` as the config classes of transformers declare them: defaults and accepted JSON types.

Lists only the fields that an inference reads. A test compares the table with the classes of the installed version.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """The JSON type of a field, in the words of an error."""

    BOOL = "true or false"
    INT = "an integer"
    INT_OR_NULL = "an integer or null"
    FLOAT = "a decimal number"
    TEXT = "a string"
    TOKEN_IDS = "a token id, a list of token ids, or null"  # noqa: S105 - not a password
    NAMES_OR_NULL = "a list of strings or null"


@dataclass(frozen=True)
class Field:
    """A field of a config class: the value of an absent field, and what the class accepts."""

    default: Any
    kind: Kind


COMMON: Mapping[str, Field] = {
    "hidden_size": Field(4096, Kind.INT),
    "num_hidden_layers": Field(32, Kind.INT),
    "num_attention_heads": Field(32, Kind.INT),
    "num_key_value_heads": Field(None, Kind.INT_OR_NULL),
    "hidden_act": Field("silu", Kind.TEXT),
    "rms_norm_eps": Field(1e-6, Kind.FLOAT),
    "tie_word_embeddings": Field(False, Kind.BOOL),
    "head_dim": Field(None, Kind.INT_OR_NULL),
    "sliding_window": Field(None, Kind.INT_OR_NULL),
    "layer_types": Field(None, Kind.NAMES_OR_NULL),
}
"""`sliding_window` and `layer_types` are not fields of `LlamaConfig`, but transformers' KV cache reads them there too;
`head_dim` is not one of `Qwen2Config`, but its attention reads it.
"""

QWEN: Mapping[str, Field] = {
    "vocab_size": Field(151936, Kind.INT),
    "intermediate_size": Field(22016, Kind.INT),
    "num_key_value_heads": Field(32, Kind.INT_OR_NULL),
    "max_position_embeddings": Field(32768, Kind.INT),
    "use_sliding_window": Field(False, Kind.BOOL),
    "sliding_window": Field(4096, Kind.INT_OR_NULL),
    "max_window_layers": Field(28, Kind.INT),
    "eos_token_id": Field(None, Kind.TOKEN_IDS),
}

FIELDS: Mapping[str, Mapping[str, Field]] = {
    "llama": {
        **COMMON,
        "vocab_size": Field(32000, Kind.INT),
        "intermediate_size": Field(11008, Kind.INT),
        "max_position_embeddings": Field(2048, Kind.INT),
        "attention_bias": Field(False, Kind.BOOL),
        "mlp_bias": Field(False, Kind.BOOL),
        "eos_token_id": Field(2, Kind.TOKEN_IDS),
    },
    "mistral": {
        **COMMON,
        "vocab_size": Field(32000, Kind.INT),
        "intermediate_size": Field(14336, Kind.INT),
        "num_key_value_heads": Field(8, Kind.INT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "sliding_window": Field(4096, Kind.INT_OR_NULL),
        "eos_token_id": Field(2, Kind.TOKEN_IDS),
    },
    "qwen2": {**COMMON, **QWEN},
    "qwen3": {
        **COMMON,
        **QWEN,
        "head_dim": Field(128, Kind.INT),
        "attention_bias": Field(False, Kind.BOOL),
    },
}
"""Family -> field name -> field. Versions 4.57 and 5 of transformers have the same defaults; 4.57 checks no types."""

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
    "quantization_config": (),
    "text_config": (),
    "text_encoder": (),
}
"""Fields of no family that code of transformers or vLLM reads and that change the output, and the values (null apart)
that do not. Every other unknown field is ignored, as transformers ignores it.
"""
