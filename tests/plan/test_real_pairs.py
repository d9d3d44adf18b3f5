"""Shipped recipes of public models plan from their locks: sizes as published, memory as arithmetic gives it."""

import hashlib
import json
import math
from dataclasses import replace

import pytest

from pipeline.files.atomic import FileDigest
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.families import config_of
from pipeline.models.weights import weight_specs
from pipeline.plan import lock as locks
from pipeline.plan.estimates import GIB
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import load
from support.paths import ROOT

PUBLISHED = {
    "gemma3-12b-spec": (11.77e9, 1.0e9),
    "gpt-oss-20b-spec": (20.9e9, None),
    "mistral-small-24b-spec": (23.57e9, None),
    "qwen3-30b-a3b-spec": (30.5e9, 0.596e9),
    "smollm3-3b-spec": (3.08e9, None),
}
"""Parameters of target and draft by their cards and the sizes of their files: of multimodal models those of the text
part. A draft of the target's own layers has no published size."""


def shipped(name: str) -> Plan:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe, lock = load(path), locks.lock_path(path)
    return make_plan(recipe, *locks.pair_configs(recipe, locks.read(lock), str(lock)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    pair = shipped(name).pair
    for config, published in zip((pair.target, pair.draft), PUBLISHED[name], strict=True):
        if published is not None:
            count = sum(math.prod(spec.shape) for spec in weight_specs(config))
            assert abs(count / published - 1) < 0.005, count


@pytest.mark.parametrize("name", PUBLISHED)
def test_memory_fits_and_holds_every_weight(name: str) -> None:
    """Ranks hold the target once; KV heads and vectors that ranks repeat, and padding, add little."""
    plan = shipped(name)
    target = sum(math.prod(spec.shape) for spec in weight_specs(plan.pair.target))
    size = 1 if plan.recipe.target.weights == "int8" else 2
    held = plan.pair.models.tp * plan.memory.target_weights
    assert size * target <= held < 1.03 * size * target
    assert plan.memory_limit is None or plan.memory.total < 0.7 * plan.memory_limit


def test_qwen3_moe_memory_is_what_arithmetic_gives() -> None:
    """Per rank, bfloat16, 8 ranks: 4 of 32 query heads, one KV head of 4, a slice of each of 128 experts."""
    memory = shipped("qwen3-30b-a3b-spec").memory
    vocabulary = 19008 * 2048  # 151,936 rows padded to 8 x 32, over 8 ranks
    attention = 2048 * (512 + 128 + 128 + 512) + 2 * 128
    experts = 128 * 96 * 3 * 2048 + 128 * 2048  # 768 / 8, and the router
    elements = 2 * vocabulary + 48 * (attention + experts + 2 * 2048) + 2048
    assert memory.target_weights == 2 * elements + 4
    assert memory.target_kv == 2 * 48 * 4 * 1 * 8192 * 128 * 2


def test_gpt_oss_memory_is_what_arithmetic_gives() -> None:
    """Per rank, bfloat16, 4 ranks: 16 of 64 query heads with a sink each, 2 KV heads, biases everywhere."""
    memory = shipped("gpt-oss-20b-spec").memory
    vocabulary = 50272 * 2880  # 201,088 rows, over 4 ranks
    attention = 2880 * (1024 + 128 + 128 + 1024) + (1024 + 128 + 128) + 2880 + 16
    experts = 32 * (3 * 720 * 2880 + 2 * 720 + 2880) + 32 * 2880 + 32
    elements = 2 * vocabulary + 24 * (attention + experts + 2 * 2880) + 2880
    assert memory.target_weights == 2 * elements + 4


def test_experts_of_many_tokens_do_not_fill_a_core() -> None:
    """Each expert's output for each of 8192 tokens, [128, 8192, 2048], took 16 GiB on every rank."""
    plan = shipped("qwen3-30b-a3b-spec")
    assert plan.memory.scratch < 4 * GIB
    dense = replace(plan.pair.target, kinds=tuple(replace(kind, experts=None) for kind in plan.pair.target.kinds))
    without = make_plan(plan.recipe, dense, plan.pair.draft).memory.scratch
    assert plan.memory.scratch >= without


@pytest.mark.parametrize("name", PUBLISHED)
def test_locked_config_is_the_file_of_its_digest(name: str) -> None:
    """A config typed by hand would not have the digest; of multimodal models a lock has the text part alone."""
    lock = locks.read(ROOT / "recipes" / f"{name}.lock")
    for source in filter(None, (lock.target, lock.draft)):
        if "gemma-3-12b" in source.source or "Mistral-Small-3.1" in source.source:
            continue
        texts = [json.dumps(source.config, indent=2) + end for end in ("", "\n")]
        files = [FileDigest(hashlib.sha256(text.encode()).hexdigest(), len(text)) for text in texts]
        assert source.files["config.json"] in files, source.source


def test_gemma4_e2b_has_its_published_size_and_caches_of_15_layers() -> None:
    """As published: 2.3B beside 2.8B of embeddings; the last 20 of 35 layers share keys and values of two."""
    config = config_of(
        {
            "model_type": "gemma4_text", "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
            "sliding_window": 512, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "tie_word_embeddings": True,
        },
        "config.json",
    )  # fmt: skip
    sizes = {spec.name: math.prod(spec.shape) for spec in weight_specs(config)}
    embeddings = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    assert abs(sum(sizes.values()) / 5.1e9 - 1) < 0.1, sum(sizes.values())
    assert abs((sum(sizes.values()) - embeddings) / 2.3e9 - 1) < 0.2, sum(sizes.values()) - embeddings
    assert config.keeping == tuple(range(15))
    assert {config.keys_of(layer) for layer in range(15, 35)} == {13, 14}
    models = ModelsSpec(config, config, "bfloat16", "bfloat16", 1, draft_replicated=False)
    state = signature(GraphSpec("decode", 1, 1, 4096), PairSpec(models, 1, 4096), PlainPacking()).state
    caches = [t for t in state if t.name.startswith("target")]
    assert sum(math.prod(t.shape) for t in caches) == 2 * 4096 * (12 * 256 + 3 * 512)


def test_gemma4_26b_a4b_has_its_published_sizes() -> None:
    """The text part as published: 25.2B, of which 3.8B are active; 25 layers with a window, 5 that see all keys."""
    config = config_of(
        {
            "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
            "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256,
            "global_head_dim": 512, "vocab_size": 262144, "max_position_embeddings": 262144, "sliding_window": 1024,
            "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128,
            "top_k_experts": 8, "moe_intermediate_size": 704, "tie_word_embeddings": True,
        },
        "config.json",
    )  # fmt: skip
    sizes = {spec.name: math.prod(spec.shape) for spec in weight_specs(config)}
    copies = 5 * 2 * 512 * 2816  # values that are read from the keys' matrices
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert abs((sum(sizes.values()) - copies) / 25.2e9 - 1) < 0.005, sum(sizes.values())
    assert abs((sum(sizes.values()) - copies - experts * (1 - 8 / 128)) / 3.8e9 - 1) < 0.01
    assert sum(config.layer(layer).window is None for layer in range(30)) == 5


def test_llama4_scout_and_maverick_have_their_published_sizes() -> None:
    """As published: 17B active of 109B and of 400B; the defaults of the class are Scout's text part."""
    scout = {"model_type": "llama4_text"}
    maverick = scout | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    for config_json, whole in ((scout, 109e9), (maverick, 400e9)):
        config = config_of(config_json, "config.json")
        sizes = {spec.name: math.prod(spec.shape) for spec in weight_specs(config)}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        active = sum(sizes.values()) - experts * (1 - 1 / config_json.get("num_local_experts", 16))
        assert abs(sum(sizes.values()) / whole - 1) < 0.02, sum(sizes.values())
        assert abs(active / 17e9 - 1) < 0.03, active
        assert config.longest == 8191
        assert [config.layer(layer).rope is None for layer in range(4)] == [False, False, False, True]


def test_gemma4_31b_has_its_published_size_and_caches_by_type_of_layers() -> None:
    """The text part as published (30.7B): 50 layers of 16 KV heads of 256 values, 10 of 4 heads of 512."""
    config = config_of(
        {
            "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504,
            "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4, "head_dim": 256,
            "global_head_dim": 512, "vocab_size": 262144, "max_position_embeddings": 262144, "sliding_window": 1024,
            "final_logit_softcapping": 30.0, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10, "tie_word_embeddings": True,
        },
        "config.json",
    )  # fmt: skip
    full = [spec for spec in weight_specs(config) if config.of_weight(spec.name).head_dim == 512]
    values = sum(math.prod(spec.shape) for spec in full if ".v_proj." in spec.name)
    assert values == 10 * 4 * 512 * 5376  # read from the keys' matrices
    count = sum(math.prod(spec.shape) for spec in weight_specs(config)) - values
    assert abs(count / 30.7e9 - 1) < 0.005, count
    models = ModelsSpec(config, config, "bfloat16", "bfloat16", 8, draft_replicated=False)
    state = signature(GraphSpec("decode", 1, 1, 4096), PairSpec(models, 1, 4096), PlainPacking()).state
    caches = [t for t in state if t.name.startswith("target")]
    assert sum(math.prod(t.shape) for t in caches) == 2 * 4096 * (50 * 2 * 256 + 10 * 1 * 512)
