"""How configs of the public writers of EAGLE-3 heads are read: taps, switches, vocabulary; refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import SourceError
from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import describe, doubts, fitted, opened_config, tensor_name
from pipeline.models.families import config_of
from pipeline.models.rope_types import LinearRope, YarnRope
from pipeline.models.weights import weight_specs
from support.heads import ANGELSLIM, FLAT, MODELOPT, SAFEAILAB, SIZES, SPECULATORS, Parts, shapes
from support.paths import ROOT

TAPPED = "eagle_aux_hidden_state_layer_ids"
TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 36}, "target")
USUAL, USUAL_12 = (2, 18, 33), (2, 6, 9)


PLAIN = Parts()


def read(config: dict[str, Any], parts: Parts = PLAIN, **readings: Any) -> ModelConfig:
    """The config of a head that is fitted to a target of 36 layers."""
    return fitted(TARGET, config_of(opened_config(config, shapes(parts), readings), "config.json"), "config.json")


def nested(ids: list[int], config: dict[str, Any] = FLAT) -> dict[str, Any]:
    return config | {"eagle_config": {**config.get("eagle_config", {}), TAPPED: ids}}


@pytest.mark.parametrize(
    ("config", "writer", "taps"),
    [
        (FLAT, "specforge", USUAL),
        (SAFEAILAB, "safeailab", USUAL),
        (ANGELSLIM, "angelslim", USUAL),
        (MODELOPT, "modelopt", USUAL),
        (SPECULATORS, "speculators", USUAL),
        (nested([1, 17, 32]), "specforge", USUAL),
        (nested([1, 17, 32], MODELOPT), "modelopt", USUAL),
        (nested([0, 9, 20]), "specforge", (1, 10, 21)),
        (nested([2, 18, 33]), "specforge", USUAL),
        (nested([24, 30, 36], MODELOPT), "modelopt", (24, 30, 36)),
        (ANGELSLIM | {"aux_hidden_states_layer_ids": [2, 9, 35]}, "angelslim", (3, 10, 36)),
        (FLAT | {TAPPED: [1, 17, 32]}, "specforge", (1, 17, 32)),
        (SPECULATORS | {TAPPED: [3, 10, 36]}, "speculators", (3, 10, 36)),
        (SPECULATORS | {TAPPED: None}, "speculators", USUAL),
        (nested([0, 16, 31]) | {TAPPED: [1, 17, 32], "created_by": "tandem distill"}, "tandem", (1, 17, 32)),
    ],
)
def test_taps_are_inputs_of_layers_whoever_wrote_them(config, writer, taps):
    """Was: ids of `eagle_config` were inputs, so heads of SpecForge and ModelOpt were read one layer low."""
    head = read(config).eagle3
    assert (head.writer, head.taps) == (writer, taps)


@pytest.mark.parametrize(
    ("told", "taps"), [("inputs", (1, 17, 32)), ("outputs", (2, 18, 33)), ([0, 5, 36], (0, 5, 36))]
)
def test_a_recipe_says_what_the_ids_mean_or_replaces_them(told, taps):
    assert read(nested([1, 17, 32]), taps=told).eagle3.taps == taps


def test_five_taps_follow_from_the_ids_and_fc():
    head = read(FLAT | {TAPPED: [2, 9, 18, 27, 36]}, Parts(taps=5)).eagle3
    assert (head.taps, head.tap_count) == ((2, 9, 18, 27, 36), 5)


@pytest.mark.parametrize(
    "config",
    [FLAT | {"eagle_config": {"use_aux_hidden_state": False}}, FLAT, FLAT | {"eagle3_layers_to_capture": [-1]}],
)
def test_a_head_without_fc_reads_the_targets_output(config):
    head = read(config, Parts(taps=0, hidden_norm=False)).eagle3
    assert head.reads_output
    assert not head.hidden_norm
    assert head.taps == ()


SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@pytest.mark.parametrize(
    ("config", "parts", "on"),
    [
        (FLAT, (), ()),
        (FLAT | {"norm_before_residual": True}, (), ("norm_before_residual",)),
        (SPECULATORS, (), ("norm_before_residual",)),
        (SPECULATORS | {"norm_before_residual": False}, (), ()),
        (SPECULATORS | {"norm_output": True}, (), ("norm_before_residual", "norm_output")),
        (FLAT | {"norm_output": True}, (), ()),
        (MODELOPT | {"norm_output": True}, (), ("norm_output",)),
        (FLAT | {"eagle_config": {"return_hidden_post_norm": True, "use_last_layernorm": True}}, (), ("norm_output",)),
        (FLAT | {"eagle_config": {"norm_before_fc": True}}, ("norm_before_fc",), ("norm_before_fc",)),
        (FLAT, ("norm_before_fc",), ("norm_before_fc",)),
        (FLAT | {"fc_norm": True}, ("fc_norm",), ("fc_norm",)),
        (FLAT | {"eagle_config": {"use_aux_norm": True}}, ("fc_norm",), ("fc_norm",)),
    ],
)
def test_switches_of_norms_are_those_of_the_writer(config, parts, on):
    head = read(config, Parts(options=parts)).eagle3
    assert tuple(name for name in SWITCHES if getattr(head, name)) == on


def test_a_head_with_yarn_is_read():
    """ModelOpt adds it at export; beyond its own length a head follows its target."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048}
    head = read(FLAT | {"rope_scaling": rope})
    assert isinstance(head.kinds[0].rope.scaling, YarnRope)
    assert head.limits == ()


def test_a_recipe_overrides_switches_and_rope():
    yarn = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    told = read(FLAT | yarn | {"norm_output": True}, norm_output=True, norm_before_residual=True, rope="default")
    assert (told.eagle3.norm_output, told.eagle3.norm_before_residual) == (True, True)
    assert told.kinds[0].rope.scaling is None
    assert read(FLAT | yarn).kinds[0].rope.scaling == LinearRope(4.0)


@pytest.mark.parametrize(
    ("parts", "vocab", "shares_head"),
    [
        (Parts(), 128, False),
        (Parts(draft_vocab=None), None, False),
        (Parts(draft_vocab=None, lm_head=False), None, True),
    ],
)
def test_the_vocabulary_follows_from_the_tensors(parts, vocab, shares_head):
    config = read(FLAT | {"draft_vocab_size": vocab or 512}, parts)
    assert (config.draft_vocab, config.shares_head) == (vocab, shares_head)


@pytest.mark.parametrize("config", [SPECULATORS, FLAT])
def test_norms_and_biases_of_the_attention_follow_from_the_tensors(config):
    found = read(config | {"attention_bias": True}, Parts(layer="layers.0.", options=("qk_norm", "bias")))
    assert (found.qk_norm, found.qkv_bias, found.out_bias) == ("head", True, True)


def test_sizes_of_speculators_are_read_from_the_layers_config():
    """Was: refused, num_hidden_layers=None."""
    config = read(SPECULATORS)
    assert (config.hidden, config.heads, config.kv_heads, config.head_dim, config.vocab) == (64, 8, 4, 16, 512)


def test_doubts_name_the_key_of_the_recipe_that_decides_them():
    config = nested([0, 9, 20]) | {"norm_output": True}
    found = doubts(opened_config(config, shapes(Parts()), {}))
    assert [text.rpartition(": ")[2] for text in found] == ["draft.taps", "draft.norm_output"]
    assert not doubts(opened_config(config, shapes(Parts()), {"taps": "outputs", "norm_output": True}))


def test_describe_names_writer_taps_and_their_origin():
    text = describe(read(nested([1, 17, 32]) | {"norm_before_residual": True}))
    assert "of specforge: reads the inputs of layers 2, 18, 33" in text
    assert f"eagle_config.{TAPPED} [1, 17, 32] read as outputs, unclear in the file" in text
    assert text.endswith("norm_before_residual")


@pytest.mark.parametrize(
    ("config", "parts", "what"),
    [
        (FLAT | {"num_hidden_layers": 2}, {}, "num_hidden_layers=2"),
        (nested([3, 1]), {}, "ascending"),
        (nested([1, 17, 90]), {}, "the target has 36 layers"),
        (FLAT | {TAPPED: [1, 2, 3, 4]}, {}, "lists 4 layers"),
        (FLAT, {"taps": 5}, "reads 5 states of the target, but the file lists no layers"),
        (FLAT | {"norm_before_fc": True, "fc_norm": True}, {}, "norm_before_fc is true as well"),
        (FLAT | {"eagle_config": {"use_last_layernorm": False}}, {}, "use_last_layernorm"),
        (FLAT | {"eagle_config": {"eh_proj_before_attn": True}}, {}, "eh_proj_before_attn"),
        (FLAT | {"bias": True}, {}, "bias"),
        (FLAT | {"norm_before_residual": "yes"}, {}, "norm_before_residual"),
        (FLAT | {"logit_scale": 0.5}, {}, "logit_scale"),
        (FLAT, {"draft_vocab": None}, "neither d2t nor t2d"),
        (FLAT | {"architectures": ["K3DSparkModel"]}, {}, "DSpark over layers of another family"),
        (FLAT | {"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, {}, "MLA"),
        (FLAT | {"architectures": ["EagleLlamaForCausalLM"]}, {}, "EAGLE-1"),
        (FLAT | {"pard_token": 3}, {}, "PARD"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, parts, what):
    with pytest.raises(SourceError, match=what):
        read(config, Parts(**parts))


@pytest.mark.parametrize("name", ["fc.bias", "parallel_draft_heads.0.medusa_layers.0.linear.weight"])
def test_tensors_of_other_kinds_are_refused_by_name(name):
    with pytest.raises(SourceError, match=name):
        config_of(opened_config(FLAT, {**shapes(Parts()), name: (1,)}, {}), "config.json")


FILES = {
    "speculators": (USUAL_12, ("norm_before_residual",)),
    "speculators-plain": (USUAL_12, ()),
    "speculators-qwen3": (USUAL_12, ("norm_before_residual",)),
    "speculators-bias": (USUAL_12, ("norm_before_residual",)),
    "speculators-3.1": ((1, 3, 6, 9, 12), ("fc_norm", "norm_output")),
    "speculators-before-fc": (USUAL_12, ("norm_before_fc",)),
    "speculators-whole": (USUAL_12, ("norm_before_residual",)),
    "specforge": (USUAL_12, ()),
    "specforge-ids": ((1, 6, 9), ()),
    "specforge-3.1": ((1, 6, 9), ("fc_norm",)),
    "specforge-wide": (USUAL_12, ()),
    "specforge-whole": (USUAL_12, ()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_tools_themselves_are_read(name):
    """Configs and shapes that speculators 0.9 and SpecForge 0.2 wrote (`support/public_heads.py`), for 12 layers."""
    written = json.loads((ROOT / f"tests/public_heads/{name}.json").read_text())
    config = config_of(opened_config(written["config"], written["tensors"], {}), name)
    head = fitted(config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12}, "target"), config, name).eagle3
    assert (head.taps, tuple(switch for switch in SWITCHES if getattr(head, switch))) == FILES[name]
    assert head.writer == name.partition("-")[0]
    assert config.qk_norm == ("head" if name == "speculators-qwen3" else None)
    assert config.out_bias == (name == "speculators-bias")
    named = {tensor_name(key): tuple(shape) for key, shape in written["tensors"].items() if key != "t2d"}
    assert named == {spec.name: spec.shape for spec in weight_specs(config)}
