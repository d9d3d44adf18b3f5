"""What `config_of` reads of single configs as their classes do, and what it refuses, by field name."""

import pytest

from pipeline.errors import SourceError
from pipeline.models.config import Layer, Limit
from pipeline.models.families import config_of
from pipeline.models.rope import in_both_layouts
from pipeline.models.rope_types import LinearRope, Llama3Rope, Rope, RopeScaling, YarnRope
from pipeline.validate.reading import difference, here, readable
from support.configs import DYNAMIC, LINEAR, LLAMA3, LONG, SMALL, YARN


def turned(theta: float, scaling: RopeScaling) -> tuple[Layer, ...]:
    """The one kind of layers of a small model with this rotary embedding."""
    return (Layer(Rope(theta, SMALL["head_dim"], scaling)),)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": "mistral", "sliding_window": ...}, {"kinds": (Layer(Rope(1e4, 8), 4096),)}),
        ({"model_type": "mistral", "num_attention_heads": 16, "num_key_value_heads": ...}, {"kv_heads": 8}),
        ({"model_type": "qwen3", "max_position_embeddings": ...}, {"max_position": 32768}),
        ({"model_type": "qwen3", "head_dim": ...}, {"head_dim": 128}),
        ({"model_type": "qwen2", "use_sliding_window": True}, {"kinds": (Layer(Rope(1e4, 8)),)}),  # from layer 28 on
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, {"pattern": (0, 1)}),
        # transformers' KV cache drops older tokens
        ({"model_type": "llama", "sliding_window": 16}, {"limits": (Limit("sliding_window", 16),)}),
        ({"model_type": "llama"}, {"eos_ids": (2,)}),
        ({"model_type": "llama", "eos_token_id": None}, {"eos_ids": ()}),
        ({"model_type": "llama", "pretraining_tp": 2}, {"family": "llama"}),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "a"}}, {"kinds": turned(1e4, LinearRope(2.0))}),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7.0}}, {"kinds": turned(10000.0, LinearRope(2.0))}),
        ({"rope_scaling": {}, "rope_parameters": LINEAR}, {"kinds": turned(10000.0, LinearRope(2.0))}),
        ({"rope_parameters": LINEAR, "rope_theta": 9}, {"kinds": turned(9.0, LinearRope(2.0))}),
        ({"rope_scaling": DYNAMIC}, {"limits": (Limit("rope_scaling.dynamic", 256),)}),
        ({"rope_scaling": LONG}, {"limits": (Limit("rope_scaling.longrope", 64),)}),
        ({"rope_scaling": LONG, "max_position_embeddings": 64}, {"limits": ()}),
        ({"model_type": "gpt_oss", "hidden_act": "gelu"}, {"activation": "silu", "sinks": True}),
        ({"model_type": "gpt_oss", "experts_per_token": 4, "rope_ntk_beta": 32.0}, {"pattern": (0, 1)}),
        ({"model_type": "gpt_oss", "attention_bias": False}, {"qkv_bias": False, "out_bias": False}),
    ],
)  # fmt: skip
def test_config_of_reads_as_the_class_of_the_family(change, wanted):
    """Was: one set of defaults for all families; case M and I of the inputs that people have."""
    config = {key: value for key, value in ({"model_type": "llama"} | SMALL | change).items() if value is not ...}
    ours = config_of(config, "config.json")
    assert {key: getattr(ours, key) for key in wanted} == wanted
    assert not difference(ours, readable(config, ours.max_position)[0])


GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "num_local_experts": 128, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
"""https://huggingface.co/openai/gpt-oss-120b/blob/main/config.json, as public repositories quote it."""


@pytest.mark.parametrize("without", [(), ("rope_scaling", "layer_types", "swiglu_limit", "attention_bias")])
def test_config_of_gpt_oss_as_it_is_published(without):
    """Without the fields of the class's defaults too: it fills in YaRN, windows and bounds."""
    config = {key: value for key, value in GPT_OSS_120B.items() if key not in without}
    ours = config_of(config, "config.json")
    assert ours == config_of(GPT_OSS_120B, "config.json")
    for named in readable(config, ours.max_position):
        assert not difference(ours, named)
    rope = ours.kinds[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnRope)
    assert (rope.scaling.first, rope.scaling.last) == pytest.approx((8.092779, 17.398026), abs=1e-5)  # not whole


def test_config_of_llama3_without_its_original_length_takes_the_longest_position():
    """Was: KeyError. transformers 5 fills the length in; 4.57 rejects the config."""
    rope = config_of({"model_type": "llama", **SMALL, "rope_scaling": LLAMA3}, "config.json").kinds[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, Llama3Rope)
    assert rope.scaling.original_max_position == 256


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"num_key_value_heads": "2"}, 'num_key_value_heads="2": expected an integer or null', "without quotes"),
        ({"eos_token_id": "</s>"}, 'eos_token_id="</s>": expected a token id', "without quotes"),
        ({"rms_norm_eps": None}, "rms_norm_eps=null: expected a decimal number", "remove the field (default: 1e-06)"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing", "add factor to rope_scaling"),
        (
            {"rope_scaling": {**LINEAR, "factor": None}},
            "rope_scaling.factor=null: expected a positive number",
            "number",
        ),
        ({"rope_theta": "10000"}, 'rope_theta="10000": expected a positive number', "without quotes"),
        ({"rope_scaling": {**LINEAR, "rope_type": "default"}}, "rope_scaling.type='linear' differs", "remove one"),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2.0}},
            "rope type 'mrope' is not supported",
            "supported: default",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing", "add factor"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate=1: expected true or false", "correct"),
        (
            {"rope_scaling": YARN, "rope_theta": 1},
            "rope_scaling.rope_theta=1.0: expected more than 1 for yarn",
            "correct",
        ),
        ({"rope_scaling": LONG | {"short_factor": [1.0]}}, "short_factor=[1.0]: expected a list of 4", "correct"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing", "add factor"),
        ({"layer_types": ["full_attention"]}, "1 layers, but num_hidden_layers=2", "correct"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "no sliding window", "use_sliding_window"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, 'per_layer_config={"0"', "without"),
        ({"logit_scale": 0.5}, "logit_scale=0.5", "without"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "sliding_window=4096: no layer", "to null"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2, "head_dim": None}, "head_dim=null", "add"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported", "families"),
        ({"model_type": "gpt_oss", "swiglu_limit": 0.0}, "swiglu_limit=0.0: expected a positive number", "correct"),
        ({"model_type": "gpt_oss", "experts_per_token": 8}, "experts_per_token=8: num_experts_per_tok=4", "one of"),
        ({"model_type": "gpt_oss", "rope_scaling_factor": 8.0}, "rope_scaling_factor=8.0: factor of", "one of the two"),
        ({"model_type": "gpt_oss", "initial_context_length": 4096, "rope_scaling": YARN}, "=64 differs", "remove one"),
        ({"model_type": "gpt_oss", "sliding_window": None}, "no sliding window is set", "set sliding_window"),
    ],
)
def test_config_of_refuses_with_field_value_and_remedy(change, what, fix):
    """Was: tracebacks, or nothing at all."""
    with pytest.raises(SourceError) as raised:
        config_of({"model_type": "llama"} | SMALL | change, "config.json")
    assert what in raised.value.what
    assert fix in raised.value.fix


ROPES = [{}, {"rope_theta": 7.0}, LINEAR, LLAMA3, {**LLAMA3, "rope_theta": 50.0}, YARN, LONG]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_in_both_layouts_means_the_same(layout, rope):
    """Packed configs are read by servers with transformers 4.57, which knows no `rope_parameters`."""
    config = {"model_type": "llama", **SMALL, layout: rope, "rope_theta": 300.0}
    ours = config_of(config, "config.json")
    packed = in_both_layouts(config, ours.max_position)
    assert here(config_of(packed, "config.json"))["rotary frequencies, full_attention"].equal(
        here(ours)["rotary frequencies, full_attention"]
    )
    rope = ours.kinds[0].rope
    assert rope is not None
    assert packed.get("rope_theta") == rope.theta
    assert not difference(ours, packed)
