"""Random small configs of every family, as a `config.json` has them: other sizes, layers and options for each seed.

Written from the classes of transformers alone; knows nothing of how `pipeline.models` reads a field.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Config = dict[str, Any]
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOWS = range(2, 20)
"""Sizes of windows: a text of 100 tokens is several times as long."""


class Draw(random.Random):
    """Draws of the config of a family and a seed."""

    def chance(self, probability: float = 0.5) -> bool:
        """Return whether an event of this probability happens."""
        return self.random() < probability

    def some(self, **fields: Callable[[], Any]) -> Config:
        """Return about half of the fields; the others keep their defaults."""
        return {name: value() for name, value in fields.items() if self.chance()}

    def flags(self, *names: str) -> Config:
        """Return switches, each on or off or absent."""
        return {name: self.chance() for name in names if self.chance(0.7)}

    def types(self, layers: int, kinds: Sequence[str] = (FULL, SLIDING)) -> list[str]:
        """Return a type for each layer."""
        return [self.choice(kinds) for _ in range(layers)]


def random_config(family: str, seed: int, *, modern: bool = True) -> Config:
    """Return the `config.json` of a family; with `modern`, also in the layouts that only transformers 5 reads."""
    draw = Draw(f"{family} {seed}")
    unit = 4 if family in EXPERTS else 2
    kv_heads, size = draw.choice([1, 2, 3]), unit * draw.randint(2, 20 // unit)
    heads, layers = kv_heads * draw.choice([1, 2, 3, 4]), draw.randint(2, 4)
    config: Config = {
        "model_type": family,
        "vocab_size": draw.randint(40, 130),
        "hidden_size": heads * size,
        "intermediate_size": inner(draw),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 3e-2]),
        "tie_word_embeddings": draw.chance(),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family in OWN_HEADS:
        config |= {"head_dim": size, "hidden_size": (heads if family in MULTIPLES else 4) * draw.randint(4, 18)}
    if family == "phi3":
        config |= divided(draw, size)
    elif family not in OWN_ROPE and (modern or family != "olmo2"):  # 4.57 reads no scaled one of Olmo 2
        config |= rope(draw, size, modern, part=PARTIAL.get(family, ()))
    if not modern and family == "llama4_text" and config.get("rope_scaling", {}).get("rope_type") != "llama3":
        config.pop("rope_scaling", None)  # 4.57 takes every kind for this one
    config |= OPTIONS[family](draw, layers)
    if not modern and family == "qwen2_moe":  # whose windows 4.57 has in other layers, or in all
        config["use_sliding_window"] = False
        config.pop("layer_types", None)
    return config


def inner(draw: Draw) -> int:
    """Return an inner size; transformers' product of experts needs rows of whole 16 bytes."""
    return 4 * draw.randint(3, 20)


OWN_HEADS = (
    "llama", "mistral", "ministral3", "mixtral", "qwen3", "qwen3_moe", "glm4", "gemma2", "gemma3_text", "gemma4_text",
    "gpt_oss", "llama4_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
)  # fmt: skip
"""Families whose class has a field for the size of a head."""

MULTIPLES = ("gemma2", "gemma3_text", "llama")
"""Families of them whose class wants a hidden size that heads divide."""

EXPERTS = (
    "granitemoe", "gpt_oss", "llama4_text", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "qwen3_5_moe_text",
)  # fmt: skip
OWN_ROPE = ("gemma3_text", "gemma4_text", "granitemoehybrid", "ministral3", "olmo3", "phi3")
"""Families whose options have the rotary embedding."""

PARTIAL = {
    "glm4": (0.5, 1.0), "qwen3_next": (0.25, 0.5), "qwen3_5_text": (0.25, 0.5),
    "qwen3_5_moe_text": (0.25, 0.5),
}  # fmt: skip
"""Parts of a head that may turn, in families where not all of it does."""


def rope(draw: Draw, size: int, modern: bool, part: Sequence[float] = ()) -> Config:
    """Return the fields of a rotary embedding, in one of the layouts."""
    if part:  # an even number of values of a head turns
        part = [share for share in part if int(size * share) % 2 == 0 and int(size * share)] or [1.0]
    partial = {"partial_rotary_factor": draw.choice(part)} if part else {}
    theta, kind = draw.choice([100.0, 5000.0, 1e6]), scaling(draw)
    if modern and draw.chance():
        return {"rope_parameters": {"rope_theta": theta} | partial | kind}
    if kind["rope_type"] == "default":
        return {"rope_theta": theta} | partial
    return {"rope_theta": theta, "rope_scaling": kind} | partial


def divided(draw: Draw, size: int) -> Config:
    """Return the rotary embedding of Phi-3: each pair may have a factor of its own."""
    pairs = draw.choice([size // 4, size // 2])
    fields: Config = {"rope_theta": draw.choice([100.0, 5000.0]), "partial_rotary_factor": 2 * pairs / size}
    if draw.chance():
        factors = {f"{name}_factor": [draw.uniform(1, 9) for _ in range(pairs)] for name in ("short", "long")}
        fields["original_max_position_embeddings"] = draw.choice([64, 128])
        fields["rope_scaling"] = {draw.choice(["type", "rope_type"]): "longrope"} | factors
    return fields


def scaling(draw: Draw) -> Config:
    """Return the kind of a rotary embedding and its numbers."""
    original = {"original_max_position_embeddings": draw.choice([8, 16, 40])}
    factor = {"factor": draw.choice([1.5, 4.0, 8.0])}
    yarn = draw.some(
        attention_factor=lambda: draw.choice([0.7, 1.4]), beta_fast=lambda: draw.choice([8.0, 32.0]),
        beta_slow=lambda: draw.choice([0.5, 2.0]), truncate=draw.chance,
    )  # fmt: skip
    kinds: list[Config] = [
        {"rope_type": "default"},
        {"rope_type": "linear"} | factor,
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": draw.choice([1.0, 2.0, 4.0])}
        | factor
        | original,
        {"rope_type": "yarn"} | factor | original | yarn,
    ]
    return draw.choice([kinds[0], *kinds])


def window(draw: Draw, layers: int) -> Config:
    """Return a window, and the layers that have it where the class decides otherwise."""
    return {"sliding_window": draw.choice(WINDOWS)} | draw.some(layer_types=lambda: draw.types(layers))


def switched(draw: Draw, layers: int) -> Config:
    """Return the windows of the Qwen families, which a switch turns on."""
    if not draw.chance(0.7):
        return {"use_sliding_window": False}
    own = {"layer_types": draw.types(layers)} if draw.chance() else {"max_window_layers": draw.randint(0, layers)}
    return {"use_sliding_window": True, "sliding_window": draw.choice(WINDOWS)} | own


def experts(draw: Draw, count: str, **others: Any) -> Config:
    """Return the number of experts and of those of a token."""
    number = draw.randint(2, 9)
    return {count: number, "num_experts_per_tok": draw.randint(1, number), **others}


def multipliers(draw: Draw) -> Config:
    """Return the scales of Granite."""
    return draw.some(
        embedding_multiplier=lambda: draw.choice([3, 12.0]), logits_scaling=lambda: draw.choice([2, 8.0]),
        residual_multiplier=lambda: 0.22,
    ) | {"attention_multiplier": draw.choice([0.05, 0.3])}  # fmt: skip


def sparse(draw: Draw, layers: int) -> Config:
    """Return which layers of Qwen have experts: not those of a list, and every so many of the others."""
    return draw.some(
        mlp_only_layers=lambda: draw.sample(range(layers), draw.randint(0, layers - 1)),
        decoder_sparse_step=lambda: draw.choice([1, 2]), norm_topk_prob=draw.chance,
        moe_intermediate_size=lambda: inner(draw),
    )  # fmt: skip


def _gemma(draw: Draw, layers: int) -> Config:
    caps = draw.some(
        final_logit_softcapping=lambda: draw.choice([None, 2.0, 30.0]),
        attn_logit_softcapping=lambda: draw.choice([None, 3.0, 50.0]),
    )
    return window(draw, layers) | caps | draw.flags("attention_bias") | {
        "query_pre_attn_scalar": draw.randint(4, 40), "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip


def _gemma4(draw: Draw, layers: int) -> Config:
    kinds = {
        kind: {"rope_theta": draw.choice([100.0, 5000.0])} | draw.choice([{}, {"rope_type": "linear", "factor": 4.0}])
        for kind in (SLIDING, FULL)
    }
    part = {"partial_rotary_factor": draw.choice([0.25, 0.5, 1.0]), "factor": draw.choice([1.0, 3.0])}
    kinds[FULL] |= draw.choice([{}, {"rope_type": "proportional"} | part])
    for kind in kinds.values():
        kind.setdefault("rope_type", "default")
    small = draw.choice([{"hidden_size_per_layer_input": 0}, _small_gemma4(draw, layers)])
    number = draw.randint(2, 9)
    mixture = {
        "enable_moe_block": True, "num_experts": number, "top_k_experts": draw.randint(1, number),
        "moe_intermediate_size": inner(draw),
    }  # fmt: skip
    return {
        "layer_types": [*draw.types(layers - 1), FULL],
        "sliding_window": draw.choice(WINDOWS),
        "global_head_dim": 4 * draw.randint(1, 6),
        "attention_k_eq_v": draw.chance(),
        "num_global_key_value_heads": 1,
        "rope_parameters": kinds,
    } | draw.flags("attention_bias") | draw.some(final_logit_softcapping=lambda: 3.0) | small | (
        mixture if draw.chance() else {}
    )  # fmt: skip


def _small_gemma4(draw: Draw, layers: int) -> Config:
    """Return inputs of layers, and how many of the last layers share keys and values of those before them."""
    vocab = draw.randint(40, 130)
    inputs = {"hidden_size_per_layer_input": draw.randint(3, 20)}
    inputs |= {"vocab_size": vocab, "vocab_size_per_layer_input": vocab}
    if layers < 3 or draw.chance():
        return inputs
    sharing = draw.randint(1, layers - 2)
    own = [SLIDING, *draw.types(layers - 2 - sharing), FULL] if layers - sharing > 1 else [FULL]
    types = {"layer_types": [*own, *draw.types(sharing - 1), FULL]}
    return inputs | types | draw.flags("use_double_wide_mlp") | {"num_kv_shared_layers": sharing}


def by_type(draw: Draw) -> Config:
    """Return the rotary embedding of layers without a window; that of the others follows from the class."""
    theta = {"rope_theta": draw.choice([100.0, 5000.0])}
    return draw.choice([{}, theta, theta | {"rope_scaling": scaling(draw) | theta}])


def _granite_hybrid(draw: Draw, layers: int) -> Config:
    position = draw.choice(["rope", "nope", None])
    turning = {"position_embedding_type": position} | ({"rope_theta": 300.0} if position == "rope" else {})
    return turning | multipliers(draw) | draw.flags("attention_bias") | {
        "layer_types": ["attention"] * layers, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4,
        "shared_intermediate_size": draw.randint(17, 70), "mamba_expand": 2,
    }  # fmt: skip


def _gpt_oss(draw: Draw, layers: int) -> Config:
    clamp = draw.some(swiglu_alpha=lambda: 1.3, swiglu_limit=lambda: draw.choice([0.4, 7.0]))
    return window(draw, layers) | clamp | draw.flags("attention_bias") | experts(draw, "num_local_experts")


def _delta_net(draw: Draw, layers: int) -> Config:
    key_heads = draw.choice([1, 2, 3])
    return {
        "layer_types": [*draw.types(layers - 1, (LINEAR, LINEAR, FULL)), FULL],
        "linear_num_key_heads": key_heads, "linear_num_value_heads": key_heads * draw.choice([1, 2, 3]),
        "linear_key_head_dim": draw.randint(3, 12), "linear_value_head_dim": draw.randint(3, 12),
        "linear_conv_kernel_dim": draw.randint(2, 5),
    } | draw.flags("attention_bias")  # fmt: skip


def _with_experts(draw: Draw, layers: int) -> Config:
    shared = {"shared_expert_intermediate_size": inner(draw), "moe_intermediate_size": inner(draw)}
    return _delta_net(draw, layers) | experts(draw, "num_experts") | shared


def _llama4(draw: Draw, layers: int) -> Config:
    """Return layers with and without experts and rotary embeddings; chunks and growth only beyond the text."""
    turning = draw.choice([{"no_rope_layers": [draw.randint(0, 1) for _ in range(layers)]}, {"no_rope_layers": []}])
    mixed = draw.choice(
        [
            {"moe_layers": draw.sample(range(layers), draw.randint(0, layers))},
            {"interleave_moe_layer_step": draw.randint(1, layers)},
        ]
    )
    lengths = {"attention_chunk_size": draw.choice([None, 110, 256]), "floor_scale": draw.choice([111, 8192])}
    interval = {"no_rope_layer_interval": draw.randint(2, 5)}
    return turning | mixed | lengths | interval | experts(draw, "num_local_experts") | draw.flags(
        "use_qk_norm", "attn_temperature_tuning", "attention_bias"
    ) | {"intermediate_size_mlp": draw.randint(17, 70)}  # fmt: skip


def _smollm3(draw: Draw, layers: int) -> Config:
    turning = draw.choice(
        [{"no_rope_layers": [draw.randint(0, 1) for _ in range(layers)]}, {"no_rope_layer_interval": 2}, {}]
    )
    used = {"use_sliding_window": True, "sliding_window": draw.choice(WINDOWS)} if draw.chance() else {}
    return turning | used | draw.flags("attention_bias", "mlp_bias")


def _ministral3(draw: Draw, layers: int) -> Config:
    """Return a YaRN whose queries do not grow, or grow only beyond the text."""
    rope = {
        "type": "yarn", "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale_all_dim": draw.choice([0.5, 1.0]), "rope_theta": 900.0,
    }  # fmt: skip
    grows = draw.choice(
        [
            {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.0},
            {"original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1},
        ]
    )
    return {"rope_parameters": rope | grows, "sliding_window": draw.choice([None, *WINDOWS])}


OPTIONS: dict[str, Callable[[Draw, int], Config]] = {
    "gemma2": _gemma,
    "gemma3_text": lambda draw, layers: _gemma(draw, layers) | by_type(draw),
    "gemma4_text": _gemma4,
    "glm4": lambda draw, _: draw.flags("attention_bias"),
    "gpt_oss": _gpt_oss,
    "granite": lambda draw, _: multipliers(draw) | draw.flags("attention_bias", "mlp_bias"),
    "granitemoe": lambda draw, _: (
        multipliers(draw) | draw.flags("attention_bias") | experts(draw, "num_local_experts")
    ),
    "granitemoehybrid": _granite_hybrid,
    "llama": lambda draw, _: draw.flags("attention_bias", "mlp_bias"),
    "llama4_text": _llama4,
    "ministral3": _ministral3,
    "mistral": lambda draw, _: {"sliding_window": draw.choice([None, *WINDOWS])},
    "mixtral": lambda draw, _: (
        {"sliding_window": draw.choice([None, *WINDOWS])} | experts(draw, "num_local_experts")
    ),
    "olmo2": lambda draw, _: draw.flags("attention_bias"),
    "olmo3": lambda draw, layers: window(draw, layers) | draw.flags("attention_bias") | by_type(draw),
    "olmoe": lambda draw, _: draw.flags("attention_bias", "norm_topk_prob") | experts(draw, "num_experts"),
    "phi3": lambda draw, _: {"sliding_window": draw.choice([None, *WINDOWS])},
    "qwen2": switched,
    "qwen2_moe": lambda draw, layers: (
        switched(draw, layers) | sparse(draw, layers) | experts(draw, "num_experts")
        | draw.flags("qkv_bias") | {"shared_expert_intermediate_size": inner(draw)}
    ),
    "qwen3": lambda draw, layers: switched(draw, layers) | draw.flags("attention_bias"),
    "qwen3_5_moe_text": _with_experts,
    "qwen3_5_text": _delta_net,
    "qwen3_moe": lambda draw, layers: (
        sparse(draw, layers) | experts(draw, "num_experts") | draw.flags("attention_bias")
        | {"use_sliding_window": draw.chance(), "sliding_window": draw.choice(WINDOWS)}
    ),
    "qwen3_next": lambda draw, layers: _with_experts(draw, layers) | sparse(draw, layers),
    "smollm3": _smollm3,
}  # fmt: skip
