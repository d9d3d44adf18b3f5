"""Fields of `config.json` as the config classes of transformers declare them: defaults and accepted JSON types.

Lists only the fields that an inference reads. A test compares the table with the classes of the installed version.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.field_types import Field, Kind

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

OLMO: Mapping[str, Field] = {
    "vocab_size": Field(50304, Kind.INT),
    "intermediate_size": Field(11008, Kind.INT),
    "max_position_embeddings": Field(2048, Kind.INT),
    "rms_norm_eps": Field(1e-5, Kind.FLOAT),
    "attention_bias": Field(False, Kind.BOOL),
    "eos_token_id": Field(50279, Kind.TOKEN_IDS),
}

GRANITE: Mapping[str, Field] = {
    "vocab_size": Field(32000, Kind.INT),
    "intermediate_size": Field(11008, Kind.INT),
    "max_position_embeddings": Field(2048, Kind.INT),
    "attention_bias": Field(False, Kind.BOOL),
    "eos_token_id": Field(2, Kind.TOKEN_IDS),
    "embedding_multiplier": Field(1.0, Kind.NUMBER_OR_NULL),
    "logits_scaling": Field(1.0, Kind.NUMBER_OR_NULL),
    "residual_multiplier": Field(1.0, Kind.NUMBER_OR_NULL),
    "attention_multiplier": Field(1.0, Kind.NUMBER_OR_NULL),
    "num_local_experts": Field(8, Kind.INT_OR_NULL),
    "num_experts_per_tok": Field(2, Kind.INT_OR_NULL),
}
"""Of the classes with experts; those of the dense one accept no null."""

GEMMA: Mapping[str, Field] = {
    "vocab_size": Field(256000, Kind.INT),
    "hidden_size": Field(2304, Kind.INT),
    "intermediate_size": Field(9216, Kind.INT),
    "num_hidden_layers": Field(26, Kind.INT),
    "num_attention_heads": Field(8, Kind.INT),
    "num_key_value_heads": Field(4, Kind.INT),
    "head_dim": Field(256, Kind.INT),
    "hidden_activation": Field("gelu_pytorch_tanh", Kind.TEXT),
    "max_position_embeddings": Field(8192, Kind.INT),
    "tie_word_embeddings": Field(True, Kind.BOOL),
    "attention_bias": Field(False, Kind.BOOL),
    "query_pre_attn_scalar": Field(256, Kind.INT),
    "sliding_window": Field(4096, Kind.INT_OR_NULL),
    "final_logit_softcapping": Field(30.0, Kind.FLOAT_OR_NULL),
    "attn_logit_softcapping": Field(50.0, Kind.FLOAT_OR_NULL),
    "use_bidirectional_attention": Field(None, Kind.BOOL_OR_NULL),
    "eos_token_id": Field(1, Kind.TOKEN_IDS),
}

QWEN3_NEXT: Mapping[str, Field] = {
    **COMMON,
    "vocab_size": Field(151936, Kind.INT),
    "hidden_size": Field(2048, Kind.INT),
    "num_hidden_layers": Field(48, Kind.INT),
    "num_attention_heads": Field(16, Kind.INT),
    "num_key_value_heads": Field(2, Kind.INT),
    "head_dim": Field(256, Kind.INT),
    "max_position_embeddings": Field(32768, Kind.INT),
    "attention_bias": Field(False, Kind.BOOL),
    "linear_conv_kernel_dim": Field(4, Kind.INT),
    "linear_key_head_dim": Field(128, Kind.INT),
    "linear_value_head_dim": Field(128, Kind.INT),
    "linear_num_key_heads": Field(16, Kind.INT),
    "linear_num_value_heads": Field(32, Kind.INT),
    "full_attention_interval": Field(4, Kind.INT),
    "eos_token_id": Field(None, Kind.TOKEN_IDS),
}
"""`full_attention_interval` is not a field of the classes, but they read it where `layer_types` is absent;
`intermediate_size` is none of Qwen3.5 with experts, but a head of its family has one.
"""

QWEN3_NEXT_EXPERTS: Mapping[str, Field] = {
    "moe_intermediate_size": Field(512, Kind.INT),
    "shared_expert_intermediate_size": Field(512, Kind.INT),
    "num_experts_per_tok": Field(10, Kind.INT),
    "num_experts": Field(512, Kind.INT),
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
    "ministral3": {
        **COMMON,
        "vocab_size": Field(131072, Kind.INT),
        "intermediate_size": Field(14336, Kind.INT),
        "num_hidden_layers": Field(34, Kind.INT),
        "num_key_value_heads": Field(8, Kind.INT),
        "head_dim": Field(128, Kind.INT),
        "max_position_embeddings": Field(262144, Kind.INT),
        "rms_norm_eps": Field(1e-5, Kind.FLOAT),
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
    "gemma2": {**COMMON, **GEMMA},
    "gemma3_text": {
        **COMMON,
        **GEMMA,
        "vocab_size": Field(262208, Kind.INT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "final_logit_softcapping": Field(None, Kind.FLOAT_OR_NULL),
        "attn_logit_softcapping": Field(None, Kind.FLOAT_OR_NULL),
        "use_bidirectional_attention": Field(False, Kind.BOOL_OR_NULL),
        "sliding_window_pattern": Field(6, Kind.INT),
    },
    "gemma4_text": {
        **COMMON,
        "vocab_size": Field(262144, Kind.INT),
        "hidden_size": Field(2304, Kind.INT),
        "intermediate_size": Field(9216, Kind.INT),
        "num_hidden_layers": Field(30, Kind.INT),
        "num_attention_heads": Field(8, Kind.INT),
        "num_key_value_heads": Field(4, Kind.INT),
        "head_dim": Field(256, Kind.INT),
        "hidden_activation": Field("gelu_pytorch_tanh", Kind.TEXT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "tie_word_embeddings": Field(True, Kind.BOOL),
        "attention_bias": Field(False, Kind.BOOL),
        "sliding_window": Field(512, Kind.INT),
        "final_logit_softcapping": Field(None, Kind.FLOAT_OR_NULL),
        "use_bidirectional_attention": Field(None, Kind.TEXT_OR_NULL),
        "eos_token_id": Field(1, Kind.TOKEN_IDS),
        "hidden_size_per_layer_input": Field(256, Kind.INT),
        "vocab_size_per_layer_input": Field(262144, Kind.INT),
        "use_double_wide_mlp": Field(False, Kind.BOOL),
        "attention_k_eq_v": Field(False, Kind.BOOL),
        "num_kv_shared_layers": Field(0, Kind.INT),
        "enable_moe_block": Field(False, Kind.BOOL),
        "global_head_dim": Field(512, Kind.INT),
        "num_global_key_value_heads": Field(None, Kind.INT_OR_NULL),
    },
    "glm4": {
        **COMMON,
        "vocab_size": Field(151552, Kind.INT),
        "intermediate_size": Field(13696, Kind.INT),
        "num_hidden_layers": Field(40, Kind.INT),
        "num_key_value_heads": Field(2, Kind.INT),
        "head_dim": Field(128, Kind.INT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "rms_norm_eps": Field(1.5625e-07, Kind.FLOAT),
        "attention_bias": Field(True, Kind.BOOL),
        "eos_token_id": Field(None, Kind.TOKEN_IDS),
    },
    "gpt_oss": {
        **COMMON,
        "vocab_size": Field(201088, Kind.INT),
        "hidden_size": Field(2880, Kind.INT),
        "intermediate_size": Field(2880, Kind.INT),
        "num_hidden_layers": Field(36, Kind.INT),
        "num_attention_heads": Field(64, Kind.INT),
        "num_key_value_heads": Field(8, Kind.INT),
        "head_dim": Field(64, Kind.INT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "rms_norm_eps": Field(1e-5, Kind.FLOAT),
        "sliding_window": Field(128, Kind.INT_OR_NULL),
        "attention_bias": Field(True, Kind.BOOL),
        "num_local_experts": Field(128, Kind.INT),
        "num_experts_per_tok": Field(4, Kind.INT),
        "swiglu_alpha": Field(1.702, Kind.FLOAT),
        "swiglu_limit": Field(7.0, Kind.FLOAT),
        "eos_token_id": Field(None, Kind.TOKEN_IDS),
    },
    "granite": {
        **COMMON,
        "vocab_size": Field(32000, Kind.INT),
        "intermediate_size": Field(11008, Kind.INT),
        "max_position_embeddings": Field(2048, Kind.INT),
        "attention_bias": Field(False, Kind.BOOL),
        "mlp_bias": Field(False, Kind.BOOL),
        "eos_token_id": Field(2, Kind.TOKEN_IDS),
        "embedding_multiplier": Field(1.0, Kind.NUMBER),
        "logits_scaling": Field(1.0, Kind.NUMBER),
        "residual_multiplier": Field(1.0, Kind.NUMBER),
        "attention_multiplier": Field(1.0, Kind.NUMBER),
    },
    "granitemoe": {**COMMON, **GRANITE},
    "granitemoehybrid": {
        **COMMON,
        **GRANITE,
        "shared_intermediate_size": Field(1024, Kind.INT),
        "position_embedding_type": Field(None, Kind.TEXT_OR_NULL),
    },
    "mixtral": {
        **COMMON,
        "vocab_size": Field(32000, Kind.INT),
        "intermediate_size": Field(14336, Kind.INT),
        "num_key_value_heads": Field(8, Kind.INT),
        "max_position_embeddings": Field(131072, Kind.INT),
        "rms_norm_eps": Field(1e-5, Kind.FLOAT),
        "num_local_experts": Field(8, Kind.INT),
        "num_experts_per_tok": Field(2, Kind.INT),
        "eos_token_id": Field(2, Kind.TOKEN_IDS),
    },
    "olmo2": {**COMMON, **OLMO},
    "olmo3": {**COMMON, **OLMO, "sliding_window": Field(4096, Kind.INT_OR_NULL)},
    "olmoe": {
        **COMMON,
        **OLMO,
        "hidden_size": Field(2048, Kind.INT),
        "intermediate_size": Field(2048, Kind.INT),
        "num_hidden_layers": Field(16, Kind.INT),
        "num_attention_heads": Field(16, Kind.INT),
        "max_position_embeddings": Field(4096, Kind.INT),
        "clip_qkv": Field(None, Kind.FLOAT_OR_NULL),
        "num_experts": Field(64, Kind.INT),
        "num_experts_per_tok": Field(8, Kind.INT),
        "norm_topk_prob": Field(False, Kind.BOOL),
    },
    "phi3": {
        **COMMON,
        "vocab_size": Field(32064, Kind.INT),
        "hidden_size": Field(3072, Kind.INT),
        "intermediate_size": Field(8192, Kind.INT),
        "max_position_embeddings": Field(4096, Kind.INT),
        "original_max_position_embeddings": Field(4096, Kind.INT),
        "rms_norm_eps": Field(1e-5, Kind.FLOAT),
        "eos_token_id": Field(32000, Kind.TOKEN_IDS),
    },
    "smollm3": {
        **COMMON,
        "vocab_size": Field(128256, Kind.INT),
        "hidden_size": Field(2048, Kind.INT),
        "intermediate_size": Field(11008, Kind.INT),
        "num_hidden_layers": Field(36, Kind.INT),
        "num_attention_heads": Field(16, Kind.INT),
        "num_key_value_heads": Field(4, Kind.INT_OR_NULL),
        "max_position_embeddings": Field(32768, Kind.INT),
        "tie_word_embeddings": Field(True, Kind.BOOL),
        "attention_bias": Field(False, Kind.BOOL),
        "mlp_bias": Field(False, Kind.BOOL),
        "use_sliding_window": Field(False, Kind.BOOL),
        "no_rope_layers": Field(None, Kind.INTS_OR_NULL),
        "no_rope_layer_interval": Field(4, Kind.INT),
        "eos_token_id": Field(128001, Kind.TOKEN_IDS),
    },
    "qwen2": {**COMMON, **QWEN},
    "qwen2_moe": {
        **COMMON,
        **QWEN,
        "hidden_size": Field(2048, Kind.INT),
        "intermediate_size": Field(5632, Kind.INT),
        "num_hidden_layers": Field(24, Kind.INT),
        "num_attention_heads": Field(16, Kind.INT),
        "num_key_value_heads": Field(16, Kind.INT_OR_NULL),
        "qkv_bias": Field(True, Kind.BOOL),
        "decoder_sparse_step": Field(1, Kind.INT),
        "moe_intermediate_size": Field(1408, Kind.INT),
        "shared_expert_intermediate_size": Field(5632, Kind.INT),
        "num_experts": Field(60, Kind.INT),
        "num_experts_per_tok": Field(4, Kind.INT),
        "norm_topk_prob": Field(False, Kind.BOOL),
        "mlp_only_layers": Field(None, Kind.INTS_OR_NULL),
    },
    "qwen3_moe": {
        **COMMON,
        "vocab_size": Field(151936, Kind.INT),
        "hidden_size": Field(2048, Kind.INT),
        "intermediate_size": Field(6144, Kind.INT),
        "num_hidden_layers": Field(24, Kind.INT),
        "num_key_value_heads": Field(4, Kind.INT),
        "max_position_embeddings": Field(32768, Kind.INT),
        "attention_bias": Field(False, Kind.BOOL),
        "use_sliding_window": Field(False, Kind.BOOL),
        "sliding_window": Field(4096, Kind.INT_OR_NULL),
        "decoder_sparse_step": Field(1, Kind.INT),
        "moe_intermediate_size": Field(768, Kind.INT),
        "num_experts": Field(128, Kind.INT),
        "num_experts_per_tok": Field(8, Kind.INT),
        "norm_topk_prob": Field(False, Kind.BOOL),
        "mlp_only_layers": Field(None, Kind.INTS_OR_NULL),
        "eos_token_id": Field(None, Kind.TOKEN_IDS),
    },
    "qwen3_next": {
        **QWEN3_NEXT,
        **QWEN3_NEXT_EXPERTS,
        "intermediate_size": Field(5632, Kind.INT),
        "decoder_sparse_step": Field(1, Kind.INT),
        "norm_topk_prob": Field(True, Kind.BOOL),
        "mlp_only_layers": Field(None, Kind.INTS_OR_NULL),
    },
    "qwen3_5_text": {
        **QWEN3_NEXT,
        "vocab_size": Field(248320, Kind.INT),
        "hidden_size": Field(4096, Kind.INT),
        "intermediate_size": Field(12288, Kind.INT),
        "num_hidden_layers": Field(32, Kind.INT),
        "num_key_value_heads": Field(4, Kind.INT),
    },
    "qwen3_5_moe_text": {
        **QWEN3_NEXT,
        **QWEN3_NEXT_EXPERTS,
        "vocab_size": Field(248320, Kind.INT),
        "num_hidden_layers": Field(40, Kind.INT),
        "num_experts_per_tok": Field(8, Kind.INT),
        "num_experts": Field(256, Kind.INT),
        "intermediate_size": Field(None, Kind.INT_OR_NULL),
    },
    "qwen3": {
        **COMMON,
        **QWEN,
        "head_dim": Field(128, Kind.INT),
        "attention_bias": Field(False, Kind.BOOL),
    },
}
"""Family -> field name -> field. Versions 4.57 and 5 of transformers have the same defaults; 4.57 checks no types."""

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
