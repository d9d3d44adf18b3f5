"""The comparison of Tandem's and transformers' readings of a config, before a build compiles."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from pipeline.errors import HostError, SourceError
from pipeline.models.config import Clamp, Experts, Layer
from pipeline.models.families import FAMILIES
from pipeline.models.rope_types import Llama3Rope, Rope
from pipeline.models.shared import layered
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve
from pipeline.validate import reading
from pipeline.validate.reading import check_reading
from support.checkpoints import write_checkpoint


def opened(root: Path, **changes) -> Checkpoint:
    write_checkpoint(root, **changes)
    return resolve(str(root), base=root, cache=root / "cache")


KNOWN = [family for family in FAMILIES if family in transformers.models.auto.configuration_auto.CONFIG_MAPPING]
NEEDED = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    **{f: {"full_attention_interval": 2} for f in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4},
}
"""Fields without which a family's defaults are those of layers that are not supported."""


@pytest.mark.parametrize("family", KNOWN)
def test_check_reading_accepts_every_family(tmp_path, family):
    check_reading(opened(tmp_path, model_type=family, head_dim=8, pad_token_id=0, **NEEDED.get(family, {})))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"norm_eps": 1e-6}, "rms_norm_eps: 1e-06, transformers: 1e-05"),
        (
            {"kinds": (Layer(Rope(500000.0, 16)),)},
            "rotary frequencies, full_attention: 8 values, the last 1.03134e-05, transformers: 8 values, the last 0.",
        ),
        (
            {"kinds": (Layer(Rope(10000.0, 16, Llama3Rope(8.0, 1.0, 4.0, 64))),)},
            "rotary frequencies, full_attention: 8 values, the last 3.95285e-05",
        ),
        ({"head_dim": 8}, "head_dim: 8, transformers: 16; "),
        ({"kinds": (Layer(Rope(1e4, 16), 64),)}, "sliding_window: 64, transformers: null"),
        ({"qkv_bias": True}, "biases of q, k, v: true, transformers: false"),
        ({"tied": True, "kv_heads": 4}, "tie_word_embeddings: true, transformers: false; num_key_value_heads: 4, "),
    ],
)
def test_check_reading_names_the_field_and_both_values(tmp_path, wrong, said):
    """Was: a wrong reading showed only after compiling, as failed gates without a cause."""
    checkpoint = opened(tmp_path)
    misread = replace(checkpoint, config=replace(checkpoint.config, **wrong))
    with pytest.raises(SourceError) as raised:
        check_reading(misread)
    assert "Tandem and transformers" in raised.value.what
    assert said in raised.value.what
    assert raised.value.where.endswith("config.json")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clamp": Clamp(7.0, 1.7)}, "bounds of SwiGLU: [7.0, 1.7], transformers: [7.0, 1.702]"),
        ({"clamp": None}, "bounds of SwiGLU: null, transformers: [7.0, 1.702]; activation at 1: 0.73"),
        ({"bias": False}, "biases of experts: false, transformers: true"),
        ({"intermediate": 32}, "inner size by layer: [32, 32], transformers: [64, 64]"),
        ({}, "sinks: false, transformers: true"),
    ],
)
def test_check_reading_names_what_differs_of_gpt_oss(tmp_path, wrong, said):
    checkpoint = opened(tmp_path, model_type="gpt_oss", head_dim=8, pad_token_id=0, num_local_experts=5)
    ours = checkpoint.config
    kinds = tuple(replace(kind, experts=replace(kind.experts, **wrong)) for kind in ours.kinds if kind.experts)
    misread = replace(checkpoint, config=replace(ours, kinds=kinds, sinks=bool(wrong)))
    with pytest.raises(SourceError) as raised:
        check_reading(misread)
    assert said in raised.value.what


@pytest.mark.parametrize(
    ("wrong", "of_experts", "said"),
    [
        ({"turned_norm": False}, {}, "norm of turned q: false, transformers: true"),
        ({"limits": ()}, {}, "attention_chunk_size: null, transformers: 8192"),
        ({}, {"shared": None}, "shared expert: null, transformers: [64, false]"),
        ({}, {"shared_gate": True}, "shared expert: [64, true], transformers: [64, false]"),
        ({"intermediate": 64}, {}, "inner size by layer: [64, 64], transformers: [40, 64]"),
    ],
)
def test_check_reading_names_what_differs_of_llama4(tmp_path, wrong, of_experts, said):
    checkpoint = opened(
        tmp_path, model_type="llama4_text", head_dim=8, pad_token_id=0, intermediate_size_mlp=40, moe_layers=[1]
    )
    ours = checkpoint.config
    kinds = [replace(kind, experts=kind.experts and replace(kind.experts, **of_experts)) for kind in ours.kinds]
    misread = replace(checkpoint, config=replace(ours, kinds=tuple(kinds), **wrong))
    check_reading(checkpoint)
    with pytest.raises(SourceError) as raised:
        check_reading(misread)
    assert said in raised.value.what


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("normalised", [False, True])
def test_check_reading_names_shares_that_are_not_those_of_transformers(tmp_path, family, normalised):
    checkpoint = opened(
        tmp_path, model_type=family, head_dim=8, pad_token_id=0, norm_topk_prob=normalised, **NEEDED.get(family, {})
    )
    check_reading(checkpoint)
    ours = checkpoint.config
    kinds = [kind.experts and replace(kind.experts, among=not normalised) for kind in ours.kinds]
    wrong = tuple(replace(kind, experts=experts) for kind, experts in zip(ours.kinds, kinds, strict=True))
    with pytest.raises(SourceError, match=f"normalised: {str(not normalised).lower()}, transformers: "):
        check_reading(replace(checkpoint, config=replace(ours, kinds=wrong)))


@pytest.mark.skipif("gemma4_text" not in KNOWN, reason="transformers 4.57 has no class for it")
@pytest.mark.parametrize(
    ("wrong", "where", "of_layers", "said"),
    [
        ({"layer_input": 4}, (), {}, "inputs of layers: 4, transformers: 6"),
        ({"layer_input": None}, (), {}, "norms of a layer: ["),
        ({}, (2, 3), {"shares_keys": False}, "layers of the keys: [0, 1, 2, 3], transformers: [0, 1, 0, 1]"),
        ({}, (3,), {"intermediate": None}, "inner size by layer: [64, 64, 128, 64], transformers: [64, 64, 128, 128]"),
        ({}, range(4), {"experts": Experts(6, 3, 28, among=True)}, "experts: [6, 3], transformers: [6, 2]"),
        ({}, range(4), {"experts": Experts(6, 2, 32, among=True)}, "experts beside a network: 32, transformers: 28"),
    ],
)
def test_check_reading_names_what_differs_of_gemma4(tmp_path, wrong, where, of_layers, said):
    """Of its layers' inputs, of keys that layers share, and of experts."""
    checkpoint = opened(
        tmp_path, model_type="gemma4_text", head_dim=8, pad_token_id=0, num_hidden_layers=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, use_double_wide_mlp=True,
        hidden_size_per_layer_input=6, vocab_size_per_layer_input=70, enable_moe_block=True, num_experts=6,
        top_k_experts=2, moe_intermediate_size=28,
    )  # fmt: skip
    check_reading(checkpoint)
    read = enumerate(map(checkpoint.config.layer, range(4)))
    layers = [replace(layer, **of_layers) if index in where else layer for index, layer in read]
    misread = replace(checkpoint, config=replace(checkpoint.config, **layered(layers), **wrong))
    with pytest.raises(SourceError) as raised:
        check_reading(misread)
    assert said in raised.value.what


MODERN = int(transformers.__version__.split(".")[0]) >= 5


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"pad_token_id": 5000}, "Padding_idx must be within num_embeddings"),
        pytest.param(
            {"initializer_range": "0.02"}, "Field 'initializer_range' expected float",
            marks=pytest.mark.skipif(not MODERN, reason="transformers 4.57 checks no types"),
        ),
    ],
)  # fmt: skip
def test_check_reading_names_what_transformers_rejects(tmp_path, field, said):
    """Was: an error of transformers from the gates, after compiling."""
    checkpoint = opened(tmp_path, **field)
    with pytest.raises(SourceError) as raised:
        check_reading(checkpoint)
    start, _, reason = raised.value.what.partition(" rejects this config: ")
    assert start == f"transformers {transformers.__version__}"
    assert said in reason
    assert "Error" not in reason


def test_check_reading_reads_the_layout_of_the_installed_transformers(tmp_path):
    """Neuron hosts have 4.57, which ignores `rope_parameters`."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    check_reading(opened(tmp_path, rope_parameters=rope))


def test_transformers_that_cannot_be_imported_is_no_fault_of_the_config(tmp_path, monkeypatch):
    """Beside a torchvision of another torch the fix was to correct the field in config.json."""

    def readable(*_: object) -> list:
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'")

    write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(reading, "readable", readable)
    with pytest.raises(HostError, match="cannot be imported") as caught:
        check_reading(resolve(str(tmp_path / "model"), base=tmp_path, cache=tmp_path / "cache"))
    assert caught.value.fix.startswith("install the packages of Tandem in a new environment")
