"""The configuration for NxD Inference: translated words, refusals, paths. NxD Inference itself is not run."""

import json
from dataclasses import replace

import pytest

from pipeline.errors import RecipeError
from pipeline.nxdi import build as stage
from pipeline.nxdi import config as nxdi
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.recipe.schema import Nxdi
from support.paths import ROOT

RECIPES = ROOT / "recipes"


def plan(name="llama-70b-spec", *, placement="sharded", **speculation):
    path = RECIPES / f"{name}.yaml"
    recipe = load(path)
    settings = {"sampling": ("greedy",), "candidates": None} | speculation
    if "stochastic" in settings["sampling"]:
        recipe = recipe.model_copy(update={"nxdi": None})
    draft = recipe.draft.model_copy(update={"placement": placement})
    recipe = recipe.model_copy(update={"speculation": recipe.speculation.model_copy(update=settings), "draft": draft})
    return make_plan(recipe, *pair_configs(recipe, read(lock_path(path)), str(lock_path(path))))


def test_package_says_it_in_nxdi_s_words():
    made = nxdi.settings(plan())
    config = made.neuron_config
    assert config["speculation_length"] == 7  # AWS publishes this pair with 7: six drafts and the last token
    assert config["enable_fused_speculation"]
    assert (config["tp_degree"], config["logical_nc_config"], config["seq_len"]) == (64, 2, 12800)
    assert config["context_encoding_buckets"] == [2048, 4096, 8192, 12288]
    assert config["on_device_sampling_config"]["do_sample"] is False
    draft = made.draft_neuron_config
    assert (draft["speculation_length"], draft["enable_fused_speculation"], draft["tp_degree"]) == (0, False, 64)
    assert made.application == ("neuronx_distributed_inference.models.llama.modeling_llama", "NeuronLlamaForCausalLM")


TUTORIAL = {
    "torch-dtype": ("torch_dtype", "bfloat16"), "tp-degree": ("tp_degree", 64), "batch-size": ("batch_size", 1),
    "max-context-length": ("max_context_length", 12288), "seq-len": ("seq_len", 12800),
    "fused-qkv": ("fused_qkv", True),
    "sequence-parallel-enabled": ("sequence_parallel_enabled", True),
    "qkv-kernel-enabled": ("qkv_kernel_enabled", True), "attn-kernel-enabled": ("attn_kernel_enabled", True),
    "mlp-kernel-enabled": ("mlp_kernel_enabled", True), "cc-pipeline-tiling-factor": ("cc_pipeline_tiling_factor", 1),
    "enable-fused-speculation": ("enable_fused_speculation", True), "speculation-length": ("speculation_length", 7),
    "enable-bucketing": ("enable_bucketing", True),
    "context-encoding-buckets": ("context_encoding_buckets", [2048, 4096, 8192, 12288]),
    "token-generation-buckets": ("token_generation_buckets", [2048, 4096, 8192, 12800]),
}  # fmt: skip
"""The flags with which AWS compiles Llama 3.3 70B and Llama 3.2 1B (SDK 2.29, "Using Speculative Decoding to improve
Llama-3.3-70B inference performance on Trn2 instances", scenario 2), each with its key of NeuronConfig. `--top-k 1` is
the sampling that the recipe decides. `--pad-token-id` pads the demo's own prompts and is no key of NeuronConfig."""


def test_shipped_70b_recipe_is_aws_s_tutorial_flag_by_flag():
    """As it stands: nothing of the recipe is replaced."""
    path = RECIPES / "llama-70b-spec.yaml"
    recipe = load(path)
    made = nxdi.settings(make_plan(recipe, *pair_configs(recipe, read(lock_path(path)), str(path))))
    for flag, (key, value) in TUTORIAL.items():
        assert made.neuron_config[key] == value, flag
    assert made.neuron_config["on_device_sampling_config"]["top_k"] == 1
    draft = made.draft_neuron_config
    assert (draft["speculation_length"], draft["enable_fused_speculation"], draft["tp_degree"]) == (0, False, 64)
    assert draft["mlp_kernel_enabled"]  # the demo copies the target's settings
    variables = {"NEURON_RT_EXEC_TIMEOUT": "600", "XLA_DENSE_GATHER_FACTOR": "0", "NEURON_RT_INSPECT_ENABLE": "0"}
    assert made.environment == variables
    assert made.vllm["environment"].items() >= variables.items()
    assert made.vllm["arguments"]["max-model-len"] == 12800
    assert made.vllm["arguments"]["max-num-seqs"] == 1


@pytest.mark.parametrize("name", ["llama-70b-spec", "llama-8b-spec", "qwen3-32b-spec"])
def test_shipped_recipes_are_taken_as_they_stand(name):
    path = RECIPES / f"{name}.yaml"
    recipe = load(path)
    made = make_plan(recipe, *pair_configs(recipe, read(lock_path(path)), str(path)))
    assert [p.what for p in nxdi.problems(made) if "draft_tokens" not in p.where] == []


@pytest.mark.parametrize(
    ("own", "key", "says"),
    [
        ({"config": {"tp_degree": 32}}, "nxdi.config.tp_degree", "other keys of the recipe decide it"),
        ({"config": {"token_generation_buckets": (4096,)}}, "token_generation_buckets", "lengths up to 12800"),
        ({"config": {"context_encoding_buckets": (12288, 2048)}}, "context_encoding_buckets", "expected ascending"),
        ({"max_model_len": 20000}, "nxdi.max_model_len", "longer than the largest cache bucket, 12800"),
    ],
)
def test_overrides_that_contradict_the_recipe_are_refused(own, key, says):
    made = plan()
    recipe = made.recipe.model_copy(update={"nxdi": Nxdi(**own)})
    with pytest.raises(RecipeError) as caught:
        nxdi.settings(replace(made, recipe=recipe))
    (problem,) = caught.value.problems
    assert problem.where.endswith(key)
    assert says in problem.what
    assert problem.fix


def test_vllm_is_not_offered_the_last_positions():
    made = plan()
    made = replace(made, recipe=made.recipe.model_copy(update={"nxdi": None}))
    arguments = nxdi.settings(made).vllm["arguments"]
    assert arguments["max-model-len"] == 12800 - 7
    assert arguments["speculative-config"]["num_speculative_tokens"] == 7


@pytest.mark.parametrize(
    ("name", "speculation", "key", "says"),
    [
        ("llama-70b-spec", {"sampling": ("greedy", "stochastic"), "candidates": 256}, "speculation.sampling",
         "verifies draft tokens by argmax only"),
        ("llama-70b-spec", {"draft_tokens": (2, 4)}, "speculation.draft_tokens", "compiles one speculation length"),
        ("llama-70b-spec", {"lookup": 3}, "speculation.lookup", "accept only the draft's tokens"),
        ("qwen3-32b-spec", {"placement": "replicated"}, "draft.placement",
         "a qwen3 draft needs as many ranks as its target"),
    ],
)  # fmt: skip
def test_package_refuses_with_the_reason(name, speculation, key, says):
    with pytest.raises(RecipeError) as caught:
        nxdi.settings(plan(name, **speculation))
    (problem,) = caught.value.problems
    assert problem.where.endswith(key)
    assert says in problem.what
    assert problem.fix


def test_package_refuses_a_draft_that_is_no_model():
    made = plan()
    head = replace(made.pair.draft, family="eagle3")
    pair = replace(made.pair, models=replace(made.pair.models, draft=head))
    with pytest.raises(RecipeError) as caught:
        nxdi.settings(replace(made, pair=pair))
    assert [p.what.partition(";")[0] for p in caught.value.problems] == ["the draft is of family eagle3"]


def test_write_records_what_nxdi_does_not(tmp_path):
    path = RECIPES / "llama-70b-spec.yaml"
    written = stage.write(tmp_path, plan(), read(lock_path(path)))
    recorded = json.loads(written.read_text())
    assert recorded["checkpoints"]["target"]["source"]["revision"] == "6f6073b423013f6a7d4d9f39144961bfbfbc386b"
    assert recorded["checkpoints"]["draft"]["path"] == "models/draft"
    assert str(tmp_path) not in written.read_text()


def test_relative_replaces_the_build_s_folders_and_nothing_else():
    baked = {
        "_name_or_path": "/cache/target/", "vocab_size": 5,
        "fused_spec_config": {"draft_model_path": "/cache/draft", "names": ["/elsewhere", "/cache/draft-2"]},
    }  # fmt: skip
    packed = nxdi.relative(baked, {"/cache/target": "models/target", "/cache/draft": "models/draft"})
    assert packed == {
        "_name_or_path": "models/target", "vocab_size": 5,
        "fused_spec_config": {"draft_model_path": "models/draft", "names": ["/elsewhere", "/cache/draft-2"]},
    }  # fmt: skip


VERSIONS = {
    "torch": "2.9.0", "torch-xla": "2.9.0", "torch-neuronx": "2.9.0.2.13.1", "neuronx-distributed": "0.18.27753",
    "libneuronxla": "2.2", "neuronx-cc": "2.24.1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("chip", "inference", "says"),
    [
        ("trn2", "missing", "not installed: neuronx-distributed-inference"),
        ("trn2", "0.1.0", "the empty placeholder of PyPI"),
        ("trn2", "0.8.16251", "neuronx-distributed is of SDK 2.29, which has 0.9.*"),
        ("trn1", "0.9.17334", "NxD Inference of SDK 2.29 does not run on trn1: since 2.29 it needs trn2"),
        ("trn2", "0.9.17334", None),
    ],
)
def test_host_problems_of_nxd_inference(chip, inference, says):
    found = [p for p in nxdi.host_problems(chip, 1, VERSIONS, inference) if "NxD Inf" in p.what or "infer" in p.what]
    assert [says in problem.what and bool(problem.fix) for problem in found] == ([] if says is None else [True])


def test_host_problems_lets_trn1_use_the_last_sdk_that_serves_it():
    older = VERSIONS | {"torch-neuronx": "2.9.0.2.12.1", "neuronx-distributed": "0.17.1", "neuronx-cc": "2.23.1"}
    assert not [p for p in nxdi.host_problems("trn1", 1, older, "0.8.16251") if "Inference" in p.what]
