"""Fields of `config.json` against the config classes of the installed transformers: defaults, types, and mutations."""

import inspect
import json
import random
from dataclasses import fields
from typing import Any, Literal

import pytest
import torch
import transformers

from pipeline.errors import SourceError
from pipeline.models.defaults import FIELDS
from pipeline.models.families import FAMILIES, config_of
from pipeline.models.field_types import Kind
from pipeline.models.other_fields import DRAFT_FIELDS, OTHER_NAMES, REFUSED
from pipeline.models.quantisation import KEY as QUANTISED
from pipeline.validate.reading import by_transformers, difference, readable
from support.configs import DYNAMIC, LINEAR, LLAMA3, LONG, YARN, small

STRICT = int(transformers.__version__.split(".")[0]) >= 5
"""transformers 5 checks the types of fields; 4.57 does not."""

KNOWN = [family for family in FAMILIES if family in transformers.models.auto.configuration_auto.CONFIG_MAPPING]
"""Families that the installed transformers has; 4.57 lacks some."""

OF_4 = {
    ("gemma2", "use_bidirectional_attention"), ("gpt_oss", "attention_bias"), ("gpt_oss", "swiglu_alpha"),
    ("gpt_oss", "swiglu_limit"), ("llama4_text", "attention_bias"), ("qwen2_moe", "layer_types"),
    ("smollm3", "tie_word_embeddings"), ("glm4", "eos_token_id"), ("qwen3_next", "mlp_only_layers"),
}  # fmt: skip
"""Fields that the classes of 4.57 do not declare, or whose default is another one there."""

RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")

UNDECLARED = {
    *(
        (family, "head_dim")
        for family in (
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "olmo2",
            "olmo3",
            "olmoe",
            "phi3",
            "qwen2",
            "qwen2_moe",
        )
    ),
    *((family, "head_dim") for family in ("qwen2_moe", "qwen3_moe", "smollm3")),
    *((family, "layer_types") for family in ("glm4", "granite", "granitemoe", "llama", "mistral", "mixtral", "olmo2")),
    *((family, "layer_types") for family in ("ministral3", "olmoe", "phi3", "qwen3_moe")),
    *((family, "sliding_window") for family in ("glm4", "granite", "granitemoe", "granitemoehybrid", "llama", "olmo2")),
    ("olmoe", "sliding_window"),
    *((family, "hidden_act") for family in ("gemma2", "gemma3_text")),
    ("gemma3_text", "sliding_window_pattern"),
    *(("gemma4_text", name) for name in ("hidden_act", "global_head_dim", "num_global_key_value_heads")),
    ("llama4_text", "sliding_window"),
    *((family, "full_attention_interval") for family in RECURRENT),
    *((family, "sliding_window") for family in RECURRENT),
    ("qwen3_5_moe_text", "intermediate_size"),
}
"""Fields that code of transformers reads though the family's class does not declare them, or that nothing reads."""

KINDS = {
    bool: Kind.BOOL,
    int: Kind.INT,
    float: Kind.FLOAT,
    str: Kind.TEXT,
    int | None: Kind.INT_OR_NULL,
    int | list[int] | None: Kind.TOKEN_IDS,
    str | None: Kind.TEXT_OR_NULL,
    list[str] | None: Kind.NAMES_OR_NULL,
    list[int] | None: Kind.INTS_OR_NULL,
    float | None: Kind.FLOAT_OR_NULL,
    float | int: Kind.NUMBER,
    float | int | None: Kind.NUMBER_OR_NULL,
    bool | None: Kind.BOOL_OR_NULL,
    Literal["all", "vision"] | None: Kind.TEXT_OR_NULL,
}
ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rope_local_base_freq"}
WITHOUT_EFFECT = {
    # of training, of memory and speed, of the text side, of what is returned beside the logits
    "attention_dropout", "initializer_range", "gradient_checkpointing", "id2label", "dtype", "name_or_path", "auto_map",
    "pad_token_id", "output_attentions", "output_hidden_states", "output_scores", "return_dict", "is_heterogeneous",
    "return_dict_in_generate", "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "embd_pdrop", "resid_pdrop",
    "use_double_wide_mlp",  # of layers that share keys and values, which are refused
    # states that a layer's cache has room for; these layers use the first one
    "number_of_conv_states",
    # properties of the class, not of the file
    "serialize_explicit_per_layer_config",
    "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan", "sub_configs",
    "default_rope_type",
    # of 4.57: of tracing, of layers of Mamba, which are refused, and whether layers turn, which a build compares
    *(() if STRICT else ("torchscript", "use_return_dict", "mamba_d_conv", "mamba_d_state", "position_embedding_type")),
}  # fmt: skip
STRICTER = (
    "partial_rotary_factor",
    ".rope_type=",
    "this field is not supported",
    "original_max_position_embeddings=",
    "rope_scaling=",
    "=true: expected an integer",
    "expected a positive",
    "expected an even number",
    "does not divide",
    "no layer of layer_types has it",
    "=null: expected a number",
    "expected an object for full_attention",
    "transformers ignores it here",
    "layers of Mamba-2",
    "experts beside a shared network",
    "expected rope, nope or null",
    "expected vocab_size=",
    "experts of this family",
    "transformers does not read this field here",
    "the last layer must be full_attention",
    "per_layer_config",
    "layers of this family have attention_chunk_size",
    "expected an object with rope_theta",
)
"""What is an error here although transformers 5 reads it: 4.57 reads it otherwise, or the model cannot be used."""


def class_of(family: str) -> Any:
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]


def declared(family: str) -> dict[str, Any]:
    """The defaults of a config class by field."""
    if STRICT:
        return {field.name: field.default for field in fields(class_of(family))}
    parameters = inspect.signature(class_of(family).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def of_base_class(field: str) -> bool:
    return field == "eos_token_id"  # 4.57: Qwen passes it to the base class, where it is None


@pytest.mark.parametrize("family", KNOWN)
def test_defaults_are_those_of_transformers(family):
    defaults = declared(family)
    for name, field in FIELDS[family].items():
        if not STRICT and (family, name) in OF_4:
            assert name not in defaults or field.default != defaults[name]
            continue
        if (family, name) in UNDECLARED or (name not in defaults and of_base_class(name)):
            assert name not in defaults
            others = ("hidden_act", "sliding_window_pattern", "global_head_dim", "full_attention_interval")
            assert field.default is None or name in others
        else:
            assert (name, field.default) == (name, defaults[name])
    assert not set(DRAFT_FIELDS) & set(defaults)
    other_names = {frozenset(names) for names in class_of(family).attribute_map.items()}
    assert not STRICT or other_names == {frozenset(names) for names in OTHER_NAMES.get(family, {}).items()}


@pytest.mark.skipif(not STRICT, reason="transformers 4.57 checks no types")
@pytest.mark.parametrize("family", KNOWN)
def test_kinds_are_the_types_of_transformers(family):
    types = {field.name: field.type for field in fields(class_of(family))}
    for name, field in FIELDS[family].items():
        if (family, name) not in UNDECLARED:
            assert (name, field.kind) == (name, KINDS[types[name]])


@pytest.mark.parametrize("family", KNOWN)
def test_every_field_that_an_inference_reads_is_known(family, monkeypatch):
    """Fields that a new version of transformers reads are in the table, refused, or without effect."""
    read: set[str] = set()
    config = class_of(family)(**small(family))
    original = type(config).__getattribute__

    def recorded(self: Any, key: str) -> Any:
        read.add(key)
        return original(self, key)

    monkeypatch.setattr(type(config), "__getattribute__", recorded)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.tensor([[1, 2, 3]])
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False, pad_token_id=0)
    monkeypatch.undo()
    of_generation = set(transformers.GenerationConfig().to_dict())
    if STRICT:
        of_generation |= set(transformers.GenerationConfig._get_default_generation_params())
    methods = {name for name in read if callable(getattr(type(config), name, None))}
    known = (
        set(FIELDS[family])
        | set(OTHER_NAMES.get(family, {}).values())
        | ROPE
        | set(REFUSED)
        | {QUANTISED, "original_max_position_embeddings"}
        | WITHOUT_EFFECT
        | of_generation
        | methods
    )
    assert not {name for name in read - known if not name.startswith("_")}


def same(config_json: dict[str, Any]) -> str:
    """The outcome of reading a config here and with transformers; fails if the meanings differ.

    4.57 reads some fields otherwise: there a build is refused with both values, before it compiles.
    """
    try:
        ours = config_of(config_json, "config.json")
    except SourceError as error:
        assert error.fix
        assert error.where == "config.json"
        if STRICT and not any(text in error.what for text in STRICTER):
            with pytest.raises(Exception):  # noqa: B017 - whatever its classes raise
                used_by_transformers(config_json)
        return "refused"
    try:
        differences = difference(ours, readable(config_json, ours.max_position)[0])
    except Exception:
        return "refused by transformers"
    if differences and not STRICT:
        return "refused"
    assert not differences, config_json
    return "read"


def used_by_transformers(config_json: dict[str, Any]) -> None:
    """Read a config with transformers and run the model: some values fail only then."""
    by_transformers(config_json)
    config = transformers.AutoConfig.for_model(**config_json)
    transformers.AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2, 3]]))


def mutations(family: str) -> list[dict[str, Any]]:
    """Every field removed, null, as a string, and with other values."""
    base = {"model_type": family, **small(family)}
    others = [0, -1, 7, 2.0, 1.5, True, "2", [], {}, ["full_attention", "sliding_attention"], ["chunked_attention"] * 2]
    configs = []
    for name in (*FIELDS[family], "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"):
        configs.append({key: value for key, value in base.items() if key != name})
        value = base.get(name, FIELDS[family][name].default if name in FIELDS[family] else 5.0)
        configs += [base | {name: change} for change in (None, str(value), value)]
        configs += [base | {name: change} for change in random.Random(name + family).sample(others, 2)]
    return configs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", KNOWN)
def test_config_of_mutations_mean_the_same_or_are_refused(family):
    """Was: defaults of another family, `null` and "2" as tracebacks, windows that no layer has."""
    outcomes = [same(config) for config in mutations(family)]
    assert {"read", "refused"} <= set(outcomes)


def rope_objects(random_: random.Random) -> Any:
    """A RoPE object as people write it, often with faults."""
    plain: list[dict[str, Any]] = [{"rope_type": "default"}, {}, {"factor": 2.0}]
    rope = dict(random_.choice([LLAMA3, LINEAR, YARN, YARN, LONG, DYNAMIC, *plain]))
    if "type" in rope and random_.random() < 0.5:
        rope["rope_type"] = rope.pop("type")
    for name, values in {
        "rope_theta": [5.0, 70, None, "10"],
        "factor": [None, "2.0", 4],
        "original_max_position_embeddings": [16, None, 32.5],
        "type": ["linear", "yarn"],
        "partial_rotary_factor": [0.5, 1.0],
        "attention_factor": [2.0, None, 0.5],
        "beta_fast": [8.0, None, 0, 2],
        "beta_slow": [0.5, None, 3],
        "mscale": [0.7, 0, None],
        "mscale_all_dim": [1.3, 1],
        "truncate": [True, False],
        "short_factor": [[1.0] * 4, [1.0] * 3, [1, 2.0, 3.5, "4"]],
    }.items():
        if random_.random() < 0.15:
            rope[name] = random_.choice(values)
        if random_.random() < 0.05:
            rope.pop(name, None)
    return rope


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", KNOWN)
def test_config_of_rope_in_one_or_both_layouts_means_the_same_or_is_refused(family):
    """Was: `rope_scaling` beside `rope_parameters` was ignored (vllm 28542)."""
    random_ = random.Random(family)
    outcomes = []
    for _ in range(30):
        config = {"model_type": family, **small(family)}
        for name in ("rope_scaling", "rope_parameters"):
            if random_.random() < 0.6:
                config[name] = random_.choice([rope_objects(random_), rope_objects(random_), None])
        if random_.random() < 0.4:
            config["rope_theta"] = random_.choice([9, 700.0, None, 0])
        if random_.random() < 0.1:
            config["original_max_position_embeddings"] = random_.choice([16, 64, None])
        outcomes.append(same(json.loads(json.dumps(config))))
    assert outcomes.count("read") > (0 if family == "gemma4_text" else 7 if STRICT else 3)


PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not STRICT, reason="transformers 4.57 has no class for it")
def test_config_of_rope_by_type_of_gemma4_means_the_same_or_is_refused():
    """The class reads an object for each type of layers, and no other layout."""
    random_, outcomes = random.Random(4), []
    for _ in range(60):
        objects = [random_.choice([PROPORTIONAL, rope_objects(random_)]) for _ in range(2)]
        by_type = {
            kind: {**({"rope_theta": random_.choice([70, 5e3])} if random_.random() < 0.9 else {}), **one}
            for kind, one in zip(("full_attention", "sliding_attention"), objects, strict=True)
            if random_.random() < 0.95
        }
        config = {"model_type": "gemma4_text", **small("gemma4_text"), "rope_parameters": by_type}
        outcomes.append(same(json.loads(json.dumps(config))))
    assert outcomes.count("read") > 7


ODD: list[Any] = [None, True, 0, -3, 1.5, 10**400, float("nan"), float("inf"), "", "2", [], [None], {}, {"a": None}]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_odd_values_never_end_in_a_traceback(family):
    """Was: KeyError, TypeError and ValueError for a missing `factor`, "2", "</s>" and others."""
    names = [*FIELDS[family], *DRAFT_FIELDS, *ROPE, *REFUSED, QUANTISED, "model_type", "architectures", "eagle_config"]
    configs = [{"model_type": family, **small(family), name: value} for name in names for value in ODD]
    more = {"beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}
    for rope in (LINEAR, LLAMA3, YARN | more | {"attention_factor": 1.0}, LONG | {"attention_factor": 1.0}, DYNAMIC):
        for name in (*rope, "rope_type", "type", "rope_theta", "original_max_position_embeddings"):
            configs += [{"model_type": family, **small(family), "rope_scaling": {**rope, name: value}} for value in ODD]
    heads = [{**config, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1} for config in configs]
    for config in configs + heads:
        try:
            config_of(config, "config.json")
        except SourceError as error:
            assert error.what
