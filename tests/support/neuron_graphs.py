"""Random pairs of every family, and every phase with its arguments: what both frontends of Neuron lower and run."""

from dataclasses import replace

import torch
from torch.nn import functional

from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models import mtp
from pipeline.models.config import ModelConfig
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, weight_specs
from support.pairs import SMALL, Pair, empty_state
from support.paths import ROOT

FAMILIES = {
    "llama": {"model_type": "llama", "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip
MECHANISMS = {
    "yarn": {"model_type": "qwen3", "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    }},
    "phi4-mini": {
        "model_type": "phi3", "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0]},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granite4": {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 3, "num_local_experts": 0,
                 "shared_intermediate_size": 40, "position_embedding_type": "nope", "attention_multiplier": 0.3},
    "glm4": {"model_type": "glm4"},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    "olmo3": {"model_type": "olmo3", "sliding_window": 6, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "sliding_window": 6},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2},
    "gemma4": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "sliding_window": 6, "attention_k_eq_v": True,
        "global_head_dim": 16, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gemma4-small": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 61,
        "sliding_window": 6, "num_hidden_layers": 4,
        "global_head_dim": 16, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4-experts": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "sliding_window": 6, "global_head_dim": 16,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24,
    },
    "llama4": {
        "model_type": "llama4_text", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size_mlp": 40,
        "no_rope_layers": [1, 0, 1], "interleave_moe_layer_step": 2,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
    "gpt-oss": {
        "model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6,
        "swiglu_limit": 0.7,
    },
    "qwen3.5": {
        "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "partial_rotary_factor": 0.5,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}  # fmt: skip
"""Families with mechanisms beyond those of `FAMILIES`, whose graphs are lowered and run too."""

BY_RANK = {f"{family}-by-rank": MECHANISMS[family] for family in ("qwen3-moe", "gpt-oss")}
"""The same with whole experts on different ranks."""

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]
LENGTH = 40
REPLAYED = 6


TAPPED = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
OVER_STATES = {
    "eagle3": {"architectures": ["LlamaForCausalLMEagle3"], **TAPPED},
    "p_eagle": {"architectures": ["PEagleDraftModel"], "num_hidden_layers": 2, "mask_token_id": 3, **TAPPED},
    "dflash": {
        "architectures": ["DFlashDraftModel"], "num_hidden_layers": 2, "block_size": 8,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2]},
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
    },
    "dspark": {
        "architectures": ["DSparkDraftModel"], "num_hidden_layers": 2, "block_size": 7,
        "dflash_config": {
            "mask_token_id": 3, "target_layer_ids": [0, 2], "markov_rank": 8, "markov_head_type": "rnn",
        },
    },
}  # fmt: skip
"""Drafts over the target's states: fields beside those of a draft of one layer."""

MODULE = "mtp"
"""A target with recurrent layers whose draft is its MTP module."""


def configs(family: str, reduced: bool) -> tuple[ModelConfig, ModelConfig]:
    """Target and draft; those of `OVER_STATES` are over the three layers of a llama, `MODULE` is inside its target."""
    if family == MODULE:
        config = SMALL | MECHANISMS["qwen3.5"]
        return config_of(config, "target"), config_of(mtp.of_target(config, "target"), "draft")
    config = SMALL | (FAMILIES | MECHANISMS | BY_RANK).get(family, FAMILIES["llama"])
    draft = config | {"num_hidden_layers": 1, "tie_word_embeddings": not reduced}
    if "linear_attention" in config.get("layer_types", ()):  # a draft needs a layer with attention
        draft |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    elif "num_kv_shared_layers" in config:
        draft |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][1:], "num_kv_shared_layers": 1}
    elif "layer_types" in config:
        draft["layer_types"] = config["layer_types"][-1:]
    if reduced:
        draft |= {"draft_vocab_size": 32}
    draft |= OVER_STATES.get(family, {})
    target = config_of(config, "target")
    by_rank = family in BY_RANK
    return target.with_experts_by_rank if by_rank else target, config_of(draft, "draft")


def make(
    family: str, rows: int = 4, tp: int = 1, *, replicated: bool = True, reduced: bool = False, lookup: bool = False
) -> Pair:
    """A random pair of a family; its draft is the target's first layer, with an embedding of its own if it is split."""
    torch.manual_seed(0)
    target, draft = configs(family, reduced)
    models = ModelsSpec(target, draft, "float32", "float32", tp, replicated)
    replayed = REPLAYED if target.delta_net is not None else 0
    shape = PairSpec(models, rows, LENGTH, 16, lookup=lookup, replayed=replayed)
    weights = {}
    for spec in weight_specs(target):
        noise = torch.randn(spec.shape) * (0.1 if spec.kind == "vector" else 0.3)
        is_norm = spec.kind == "vector" and spec.name.endswith("weight")
        weights[spec.name] = noise + 1 if is_norm else noise
        if ".layers.0." not in spec.name and spec.name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[spec.name] *= 0.3
    tensors = {f"target/{name}": tensor for name, tensor in weights.items()}
    for spec in weight_specs(draft):
        if spec.name == D2T:
            tensors["draft/d2t"] = torch.arange(32, dtype=torch.int32) // 2  # draft id i is target id i + i // 2
        elif spec.name == HEAD and reduced:
            ids = torch.arange(32) + torch.arange(32) // 2
            tensors["draft/lm_head.weight"] = weights.get(HEAD, weights[EMBEDDING])[ids]
        elif spec.name in weights and spec.shape == weights[spec.name].shape:
            tensors[f"draft/{spec.name}"] = weights[spec.name].clone()
        else:
            tensors[f"draft/{spec.name}"] = torch.randn(spec.shape) * 0.3 + (spec.kind == "vector")
    for model in ("target", "draft"):
        tensors[f"{model}/rank.vocab_offset"] = torch.zeros(1, dtype=torch.int32)
        for spec in weight_specs(shape.models.config_of(model), replicated=model == "draft" and replicated):
            if spec.split == "vocab":  # shards hold whole blocks
                one = tensors[f"{model}/{spec.name}"]
                tensors[f"{model}/{spec.name}"] = functional.pad(one, (0, 0, 0, -len(one) % 32))
    return Pair(shape, tensors, empty_state(shape))


def phases(rows: int) -> list[GraphSpec]:
    """Every phase, both samplings, several K, and a bucket smaller than the cache."""
    return [
        GraphSpec("prefill", rows, 8, 8),
        GraphSpec("prefill", rows, 8, LENGTH, sampling="stochastic"),
        GraphSpec("decode", rows, 1, LENGTH),
        GraphSpec("decode", rows, 1, 16),
        GraphSpec("decode", rows, 1, LENGTH, sampling="stochastic"),
        *(GraphSpec("speculate", rows, k + 1, LENGTH, k) for k in (1, 2, 4, 7)),
        GraphSpec("speculate", rows, 4, 16, 3),
        GraphSpec("speculate", rows, 4, LENGTH, 3, "stochastic"),
        GraphSpec("score", rows, 8, LENGTH, model="target"),
        GraphSpec("score", rows, 8, LENGTH, model="draft"),
        GraphSpec("propose", rows, 1, LENGTH, 2, "stochastic"),
        GraphSpec("verify", rows, 3, LENGTH, 2, "shaped", logprobs=5),
    ]


def arguments_of(spec: GraphSpec, shape: PairSpec):
    """Ragged rows, one of them inactive, at positions that the bucket holds."""
    generator = torch.Generator().manual_seed(3)
    rows, found = spec.batch, {}
    for one in signature(spec, shape, PlainPacking()).arguments:
        found[one.name] = {
            "tokens": lambda s=one.shape: torch.randint(61, s, generator=generator),
            "lengths": lambda: [5, 8, 0, 1][:rows], "slots": lambda: [2, 0, 3, 1][:rows] if rows == 4 else [0],
            "last_token": lambda: [4, 50, 9, 0][:rows], "position": lambda: [3, 6, 0, 11][:rows],
            "active": lambda: [True, True, False, True][:rows], "temperature": lambda: [0.7, 0.0, 1.0, 1.3][:rows],
            "top_k": lambda: [0, 3, 5, 0][:rows], "top_p": lambda: [0.9, 1.0, 0.5, 1.0][:rows],
            "seed": lambda s=one.shape: torch.randint(-(2**31), 2**31 - 1, s, generator=generator),
            "drafts": lambda s=one.shape: torch.randint(-10, 61, s, generator=generator).clamp(min=-1),
            "bias": lambda s=one.shape: torch.randn(s, generator=generator) * 3,
            "counts": lambda s=one.shape: torch.randint(-4, 3, s, generator=generator).clamp(min=0),
            "prompted": lambda s=one.shape: torch.rand(s, generator=generator) < 1 / 3,
            "allowed": lambda s=one.shape: torch.randint(-(2**31), 2**31 - 1, s, generator=generator),
            "min_p": lambda: [0.0, 0.1, 0.2, 0.0][:rows], "presence_penalty": lambda: [0.5, 0.0, -0.5, 0.0][:rows],
            "frequency_penalty": lambda: [0.3, 0.0, 0.0, 0.2][:rows],
            "repetition_penalty": lambda: [1.2, 1.0, 0.8, 1.5][:rows],
            "copied": lambda s=one.shape: torch.randint(-30, 61, s, generator=generator).clamp(min=-1),
        }[one.name]()  # fmt: skip
    return found


def sums(spec: GraphSpec, shape: PairSpec) -> int:
    """All-reduces of a graph: one for the embedding and two a layer, each time that a split model runs."""
    if spec.phase == "score" and spec.model == "draft" and shape.draft.eagle3 is not None:
        return (
            1 + 2 * (shape.target.layers - 1) if shape.models.tp > 1 else 0
        )  # the last layer of the target: keys alone
    runs = {
        "prefill": {"target": 1, "draft": 1}, "decode": {"target": 1}, "score": {spec.model: 1},
        "verify": {"target": 1}, "propose": {"draft": spec.draft_tokens},
    }  # fmt: skip
    each = runs.get(spec.phase, {"target": 1, "draft": spec.draft_tokens})
    return sum(
        times * (1 + 2 * shape.models.config_of(m).layers) for m, times in each.items() if shape.models.tp_of(m) > 1
    )


def weightless(recipe: str, layers: int | None, tp: int) -> tuple[list[GraphSpec], PairSpec]:
    """Graphs and pair of a recipe from its lock, weights in its dtype, cut to so many layers, for so many ranks."""
    from pipeline.plan.lock import lock_path, pair_configs
    from pipeline.plan.lock import read as read_lock
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import find, load

    path = find(recipe, ROOT / "recipes")
    parsed = load(path)
    changes = {"parallel": {"tensor": tp}, "target": {"weights": None}, "draft": {"weights": None}}
    cut = parsed.model_copy(update={p: getattr(parsed, p).model_copy(update=new) for p, new in changes.items()})
    configs = pair_configs(parsed, read_lock(lock_path(path)), str(lock_path(path)))
    if layers:
        configs = tuple(replace(config, layers=layers) for config in configs)
    plan = make_plan(cut, *configs)
    return list(plan.graphs), plan.pair
