"""Decoders against transformers: logits of random small models of each family."""

import re
from itertools import pairwise

import pytest
import torch
import transformers

from pipeline.errors import SourceError
from pipeline.models.caches import empty_caches
from pipeline.models.decoder import hidden_states
from pipeline.models.families import config_of
from pipeline.models.parallel import Pass, Seams, attend_up_to, plan_writes, slot_of
from pipeline.models.vocabulary import logits
from pipeline.speculation.model_chains import _Uncached

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.3, 2.0, 3.5],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 64,
}
ORIGINAL = {"original_max_position_embeddings": 64}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
GRANITE4 = MULTIPLIERS | {
    "layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 56, "mamba_n_heads": 6,
}  # fmt: skip
GRANITE_HYBRID = GRANITE4 | {"model_type": "granitemoehybrid"}
GEMMA = {"head_dim": 12, "sliding_window": 11, "num_hidden_layers": 3}
GEMMA4 = {
    "head_dim": 12, "global_head_dim": 20, "num_global_key_value_heads": 1, "sliding_window": 11,
    "num_hidden_layers": 3, "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip
ROPES4 = {
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
    "full_attention": {
        "rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 3.0, "rope_theta": 5000.0,
    },
}  # fmt: skip
INPUTS4 = GEMMA4 | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 97}
SHARED4 = GEMMA4 | {
    "num_hidden_layers": 6, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
EXPERTS4 = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 28}
GEMMA4_TEXT = GEMMA4 | {"model_type": "gemma4_text"}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
SHARED_EXPERT = MIXTURE | {"shared_expert_intermediate_size": 56}
SINKS = {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 4}
LLAMA4 = {
    "head_dim": 12, "num_local_experts": 4, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0, 1],
    "interleave_moe_layer_step": 2, "attention_chunk_size": 128, "floor_scale": 66,
}  # fmt: skip
CLASSES = {"Llama4": "Llama4TextConfig", "Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig"}
"""Names of config classes that are not the model's."""

CASES = {
    "llama2": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}),
    "linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "yarn-rope": ("Qwen3", {"rope_parameters": YARN, "head_dim": 32}),
    "yarn-scaled": ("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4}}),
    "yarn-whole": ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False}}),
    "yarn-of-one-pair": ("Llama", {"rope_parameters": YARN | {"beta_fast": 1e6, "beta_slow": 1e5}}),
    "dynamic-rope": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "longrope": ("Llama", {"rope_parameters": LONG, "max_position_embeddings": 256}),
    "longrope-scaled": ("Mistral", {"rope_parameters": LONG | {"factor": 8.0}, "sliding_window": None}),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}),
    "qwen3-windows": ("Qwen3", {"use_sliding_window": True, "layer_types": TYPES, "sliding_window": 9, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-windows": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 16}),
    "granite": ("Granite", MULTIPLIERS | {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo2-biases": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 16}),
    "olmo3-yarn": ("Olmo3", {"sliding_window": 5, "layer_types": TYPES, "rope_scaling": YARN | {"rope_theta": 700.0}}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4-quarter": ("Glm4", {"head_dim": 16, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}}),
    "phi3": ("Phi3", {"sliding_window": 16}),
    "phi4-mini": (
        "Phi3",
        {"rope_scaling": LONG | {"short_factor": [1.2, 2, 3], "long_factor": [2.0] * 3}, "partial_rotary_factor": 0.75}
        | ORIGINAL,
    ),
    "gemma2": ("Gemma2", GEMMA | {"attention_bias": True, "query_pre_attn_scalar": 24}),
    "gemma2-uncapped": ("Gemma2", GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window_pattern": 2, "final_logit_softcapping": 3.0}),
    "gemma3-linear": ("Gemma3", GEMMA | {"layer_types": TYPES, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma4": ("Gemma4", GEMMA4 | {"attention_k_eq_v": True, "final_logit_softcapping": 3.0}),
    "gemma4-own-values": ("Gemma4", GEMMA4 | {"attention_bias": True, "rope_parameters": ROPES4}),
    "gemma4-inputs": ("Gemma4", INPUTS4 | {"attention_k_eq_v": True}),
    "gemma4-small": ("Gemma4", INPUTS4 | SHARED4 | {"hidden_size_per_layer_input": 6, "attention_bias": True}),
    "gemma4-experts": ("Gemma4", GEMMA4 | EXPERTS4 | {"attention_k_eq_v": True}),
    "gemma4-whole": ("Gemma4", INPUTS4 | SHARED4 | EXPERTS4 | {"hidden_size_per_layer_input": 6, "num_experts": 80}),
    "gemma4-equal-heads": ("Gemma4", GEMMA4 | {"per_layer_config": {}, "use_bidirectional_attention": "vision"}),
    "gemma4-one-window": ("Gemma4", GEMMA4 | {"attention_k_eq_v": True, "layer_types": [*TYPES[:2], "full_attention"]}),
    "qwen3-moe": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        MIXTURE | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9},
    ),
    "qwen2-moe": ("Qwen2Moe", SHARED_EXPERT),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        SHARED_EXPERT
        | {"norm_topk_prob": True, "decoder_sparse_step": 2, "qkv_bias": False, "use_sliding_window": True}
        | {"sliding_window": 9, "max_window_layers": 2},
    ),
    "ministral3": ("Ministral3", {"sliding_window": 16, "head_dim": 12}),
    "ministral3-yarn": ("Ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.0}, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "olmoe": ("Olmoe", MIXTURE),
    "granite-moe": ("GraniteMoe", MULTIPLIERS | {"num_local_experts": 64, "num_experts_per_tok": 3}),
    "granite4": ("GraniteMoeHybrid", GRANITE4 | {"position_embedding_type": "rope", "attention_bias": True}),
    "granite4-nope": ("GraniteMoeHybrid", GRANITE4 | {"position_embedding_type": "nope", "head_dim": 12}),
    "granite4-yarn": (
        "GraniteMoeHybrid",
        GRANITE4 | {"position_embedding_type": "rope", "rope_parameters": YARN, "tie_word_embeddings": True},
    ),
    "gpt-oss": ("GptOss", SINKS | {"sliding_window": 7, "num_local_experts": 8}),
    "gpt-oss-yarn": ("GptOss", SINKS | {"rope_parameters": YARN | {"truncate": False}, "sliding_window": 16}),
    "gpt-oss-many": (  # decode steps gather the matrices of their experts
        "GptOss",
        SINKS | {"num_local_experts": 40, "layer_types": [*TYPES[:2], "full_attention"], "swiglu_limit": 0.6},
    ),
    "gpt-oss-plain": (
        "GptOss",
        {"head_dim": 12, "num_local_experts": 4, "attention_bias": False, "rope_parameters": {"rope_theta": 900.0}}
        | {"num_experts_per_tok": 1, "layer_types": ["full_attention"] * 3, "swiglu_alpha": 1.3},
    ),
    "llama4": ("Llama4", LLAMA4),
    "llama4-experts": (
        "Llama4",
        LLAMA4
        | {"num_experts_per_tok": 3, "interleave_moe_layer_step": 1, "use_qk_norm": False, "attention_bias": True}
        | {"rope_parameters": LLAMA3, "attn_temperature_tuning": False, "attention_chunk_size": None},
    ),
    "llama4-scout": ("Llama4", LLAMA4 | {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0, "factor": 16.0}}),
    "llama4-dense": ("Llama4", LLAMA4 | {"moe_layers": [], "no_rope_layers": [], "tie_word_embeddings": True}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}


def reference(case: str):
    name, changes = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    config = getattr(transformers, CLASSES.get(name, f"{name}Config"))(**(SMALL | {"pad_token_id": 0} | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
        for parameter in (*model.parameters(), *scalars):
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return config, model


def of_llama4(name, tensor):
    """A tensor of Llama 4 by another family's name; experts with the outputs first."""
    turns = ".feed_forward.experts." in name
    name = name.replace(".feed_forward.router.", ".mlp.gate.").replace(".feed_forward.", ".mlp.")
    return name, tensor.transpose(1, 2) if turns else tensor


def unfused(config, state):
    """The matrices that some classes stack, as checkpoints are read."""
    state = dict(of_llama4(*item) for item in state.items())
    parts = {"qkv_proj": (("q_proj", config.heads), ("k_proj", config.kv_heads), ("v_proj", config.kv_heads))}
    for name, tensor in state.items():
        block, _, leaf = name.rpartition(".")
        stem, _, fused = block.rpartition(".")
        if ".experts." in name and any("proj_bias" in other for other in state):
            yield from biased_experts_of(name, tensor)
        elif ".router." in name or ".experts." in name or ".block_sparse_moe." in name:
            yield from experts_of(name, tensor)
        elif ".shared_mlp." in name and fused == "output_linear":
            yield name.replace("shared_mlp.output_linear", "mlp.down_proj"), tensor
        elif fused in ("gate_up_proj", "input_linear"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield f"{stem}.{part}.{leaf}".replace(".shared_mlp.", ".mlp."), half
        elif fused in parts:
            rows = [heads * config.head_dim for _, heads in parts[fused]]
            for (part, _), own in zip(parts[fused], tensor.split(rows), strict=True):
                yield f"{stem}.{part}.{leaf}", own
        else:
            yield name, tensor
            layer = config.layer(int(name.split(".")[2])) if ".layers." in name else None
            if layer and layer.values_are_keys and ".k_proj." in name:
                yield name.replace("k_proj", "v_proj"), tensor


def biased_experts_of(name, tensor):
    """The same of gpt-oss: gate and up in turn, inputs first."""
    leaf = name.rpartition(".")[2].removesuffix("_bias")
    ours = name.removesuffix("_bias") + (".bias" if name.endswith("_bias") else ".weight")
    for phase, part in enumerate(("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)):
        own = tensor[..., phase::2] if leaf == "gate_up_proj" else tensor
        yield ours.replace(leaf, part), own.transpose(1, 2) if own.ndim == 3 else own


def experts_of(name, tensor):
    """The router and the matrices of experts, by the names that models use."""
    name = re.sub(r"(\d)\.(router|experts)\.", r"\1.mlp.\2.", name).replace(".router.proj.", ".router.")  # Gemma 4
    name = name.replace(".block_sparse_moe.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")
    if name.endswith("experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
    else:
        yield f"{name}.weight" if name.endswith("down_proj") else name, tensor


def run(config, weights, tokens, start, state, kv=64):
    rows, count = tokens.shape
    positions = start + torch.arange(count).expand(rows, count)
    seams = Seams()
    keep = torch.ones(rows, count, dtype=torch.bool)
    writes = plan_writes(state, torch.arange(rows), positions, keep, length=kv + 1)
    attend = attend_up_to(positions, kv)
    hidden = hidden_states(config, weights, seams, tokens, Pass(positions, state, writes, attend))
    return logits(config, weights, seams, hidden.last_BTH)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    hf_config, model = reference(case)
    config = config_of(hf_config.to_dict(), case)
    state = empty_caches(config, 2, 65, torch.float32)
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        weights = dict(unfused(config, model.state_dict()))
        first = run(config, weights, tokens[:, :33], 0, state)
        second = run(config, weights, tokens[:, 33:38], 33, state)
        last = run(config, weights, tokens[:, 38:39], 38, state)
    got = torch.cat((first, second, last), dim=1)
    error = (got - expected[:, :39]).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


WINDOWED = [
    "mistral-window", "ministral3", "mixtral", "phi3", "gemma2", "gemma3", "gpt-oss", "olmo3", "smollm3-windows",
    "qwen2-windows", "qwen3-windows", "qwen3-moe-mixed", "gemma4", "gemma4-small", "gemma4-whole",
]  # fmt: skip
MOST = 9
"""Tokens of the longest chunk."""


@pytest.mark.parametrize("case", WINDOWED)
def test_logits_from_rings_equal_transformers_however_a_text_is_cut(case):
    """Of several turns of the shortest ring that holds a window and a chunk; chunks of every length, one token too."""
    hf_config, model = reference(case)
    config = config_of(hf_config.to_dict(), case)
    slots = {kind.window: kind.window - 1 + MOST for kind in config.kinds if kind.window}
    state = {
        f"{part}.{layer}": torch.zeros(
            2, config.at(layer).kv_heads, slots.get(config.layer(layer).window, 128) + 1, config.at(layer).head_dim
        )
        for layer in config.keeping
        for part in ("k", "v")
    }
    tokens, cuts = torch.randint(0, 97, (2, 127)), [0]
    assert 4 * max(slots.values()) < 127
    while cuts[-1] < 127:
        cuts.append(min(cuts[-1] + int(torch.randint(1, MOST + 1, ())), 127))
    with torch.no_grad():
        expected = model(tokens).logits
        weights = dict(unfused(config, model.state_dict()))
        parts = [run(config, weights, tokens[:, one:other], one, state, 128) for one, other in pairwise(cuts)]
    error = (torch.cat(parts, dim=1) - expected).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("case", ["gemma3", "gemma4-small", "llama2"])
def test_a_pass_needs_no_caches(case):
    """As training reads texts: nothing is written, windows included."""
    hf_config, model = reference(case)
    config, tokens = config_of(hf_config.to_dict(), case), torch.randint(0, 97, (2, 30))
    positions = torch.arange(30).expand(2, 30)
    with torch.no_grad():
        weights = dict(unfused(config, model.state_dict()))
        own = Pass(positions, {}, None, attend_up_to(positions[:1]))
        hidden = hidden_states(config, weights, _Uncached(), tokens, own)
        error = (logits(config, weights, Seams(), hidden.last_BTH) - model(tokens).logits).abs()
    assert error.max() < 2e-4, f"max {error.max():.2e}, mean {error.mean():.2e}"


def test_a_ring_that_is_too_short_for_a_chunk_is_noticed():
    """The test above can fail: with a slot less, a chunk writes over a key that its first query sees."""
    case = "mistral-window"
    hf_config, model = reference(case)
    config, tokens = config_of(hf_config.to_dict(), case), torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        weights, expected = dict(unfused(config, model.state_dict())), model(tokens).logits
        errors = []
        for slots in (16 - 1 + 8, 16 - 1 + 7):
            names = [f"{part}.{layer}" for layer in range(config.layers) for part in "kv"]
            state = {name: torch.zeros(2, config.kv_heads, slots + 1, config.head_dim) for name in names}
            parts = [run(config, weights, tokens[:, at : at + 8], at, state, 128) for at in range(0, 40, 8)]
            errors.append(float((torch.cat(parts, dim=1) - expected).abs().max()))
    assert errors[0] < 2e-4 < 1e-2 < errors[1]


@pytest.mark.parametrize("slots", [1, 7, 64, 2239, 131_072])
def test_slots_are_positions_modulo_their_number(slots):
    positions = torch.cat((torch.arange(5000), torch.randint(0, 1 << 24, (5000,)), torch.arange(1, 100) * slots))
    positions = torch.cat((positions, positions[positions > 0] - 1))
    assert torch.equal(slot_of(positions, slots), positions % slots)
    assert torch.equal(slot_of(positions.int(), slots), positions.int() % slots)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
        (GRANITE_HYBRID | {"layer_types": ["mamba", "attention", "mamba"]}, r'layer_types=\["mamba"\]'),
        (GRANITE_HYBRID | {"layer_types": None}, "layer_types=null: layers of Mamba-2"),
        ({"model_type": "gemma4_text"}, "vocab_size_per_layer_input=262144"),
        (GEMMA4_TEXT | {"num_kv_shared_layers": 3}, "num_kv_shared_layers=3: expected 0 to 2"),
        (GEMMA4_TEXT | {"num_kv_shared_layers": -1}, "num_kv_shared_layers=-1"),
        (GEMMA4_TEXT | {"num_kv_shared_layers": 1}, "num_kv_shared_layers=1: each type of layers needs"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1: this field is not supported"),
        (GEMMA4_TEXT | INPUTS4 | {"vocab_size_per_layer_input": 96}, "vocab_size_per_layer_input=96"),
        (GEMMA4_TEXT | INPUTS4 | {"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input=-1"),
        (GEMMA4_TEXT | {"enable_moe_block": True}, "num_experts=null"),
        (GEMMA4_TEXT | EXPERTS4 | {"top_k_experts": 7}, "top_k_experts=7: expected at most num_experts=6"),
        (GEMMA4_TEXT | {"use_bidirectional_attention": "all"}, 'use_bidirectional_attention="all"'),
        (GEMMA4_TEXT | {"layer_types": TYPES}, "the last layer must be full_attention"),
        (GEMMA4_TEXT | {"rope_theta": 10000.0}, "rope_theta=10000.0"),
        (GEMMA4_TEXT | {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        (GEMMA4_TEXT | {"per_layer_config": {"2": {"sliding_window": 8}}}, "per_layer_config.sliding_window=8"),
        (GEMMA4_TEXT | {"attention_k_eq_v": True, "num_global_key_value_heads": 4}, "num_global_key_value_heads=4"),
        (GRANITE_HYBRID | {"num_local_experts": 62}, "num_local_experts=62"),
        (GRANITE_HYBRID | {"position_embedding_type": "alibi"}, 'position_embedding_type="alibi"'),
    ],
)
def test_config_of_refuses_by_name(change, named):
    with pytest.raises(SourceError, match=named):
        config_of({"model_type": "llama"} | SMALL | change, "config.json")


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, [4096] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, [None] * 3),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, [None, None, 4096]),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "sliding_window": 4096}, [None] * 3),
        ({"model_type": "qwen3", "layer_types": TYPES, "use_sliding_window": True}, [4096, None, 4096]),
        ({"model_type": "gemma2"}, [4096, None, 4096]),
        ({"model_type": "gemma3_text", "sliding_window": 9}, [9] * 3),
        ({"model_type": "olmo3", "num_hidden_layers": 4}, [4096, 4096, 4096, None]),
        ({"model_type": "phi3", "sliding_window": 2047}, [2047] * 3),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 8},
         [None, 8, None]),
    ],
)  # fmt: skip
def test_config_of_knows_the_windows_of_layers(change, windows):
    config = config_of({"model_type": "llama"} | SMALL | change, "config.json")
    assert [config.layer(layer).window for layer in range(config.layers)] == windows
