"""Configs of new drafts."""

import json
from dataclasses import replace

import pytest
import torch

from pipeline.distill.head import continued_config, head_config, initial, parallel_config, public_name
from pipeline.models.eagle3 import fitted
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, weight_specs
from pipeline.sources.heads import fit
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from support.checkpoints import CONFIG, random_weights, write_checkpoint
from support.heads import P_EAGLE, SPECULATORS, Parts, write_head


def test_head_config_has_the_sizes_of_a_target_that_leaves_them_to_its_family(tmp_path):
    """Was: absent fields took the defaults of Llama, the head's family: 2048 positions for a Mistral target."""
    config = {"model_type": "mistral", "num_attention_heads": 16, "num_key_value_heads": 8}
    write_checkpoint(tmp_path / "m", random_weights(CONFIG | config), **config)
    text = (tmp_path / "m" / "config.json").read_text()
    for absent in ('"max_position_embeddings": 128, ', '"num_key_value_heads": 8, '):
        assert absent in text
        text = text.replace(absent, "")
    (tmp_path / "m" / "config.json").write_text(text)
    target = resolve(str(tmp_path / "m"), base=tmp_path, cache=tmp_path / "cache")
    head = config_of(head_config(target, 32, (0, 1, 2)), "head")
    assert (head.max_position, head.kv_heads) == (131072, 8)
    assert (head.head_dim, head.norm_eps) == (target.config.head_dim, target.config.norm_eps)


@pytest.mark.parametrize(
    ("taps", "inputs", "outputs"),
    [((2, 16, 29), None, None), ((2, 15, 27), [2, 15, 27], [1, 14, 26]), ((0, 1, 2), [0, 1, 2], None)],
)
def test_head_config_lists_layers_as_each_server_reads_them(taps, inputs, outputs, tmp_path):
    """vLLM and speculators: inputs at the top level; SGLang: outputs in `eagle_config`; the usual ones: neither."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=32)
    target = resolve(str(tmp_path / "m"), base=tmp_path, cache=tmp_path / "cache")
    config = head_config(target, 32, taps)
    assert config.get("eagle_aux_hidden_state_layer_ids") == inputs
    assert config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids") == outputs
    assert fitted(target.config, config_of(config, "head")).eagle3.taps == taps
    assert config_of(config, "head").eagle3.writer == "tandem"


def test_a_p_eagle_head_starts_from_layers_of_the_target(tmp_path):
    """Later layers are whole layers of the target; the config has Amazon's field, which vLLM reads."""
    target = resolve("pico://llama?layers=4", base=tmp_path, cache=tmp_path / "cache")
    written = parallel_config(target, 128, (0, 2, 4), 2)
    config = config_of(written, "head")
    assert (config.draft_kind.method, config.layers, config.eagle3.mask_token) == ("p_eagle", 2, 511)
    assert (config.eagle3.writer, fitted(target.config, config).eagle3.taps) == ("tandem", (0, 2, 4))
    new = initial(target, config, torch.arange(128), 0, (1, 3))
    shapes = {spec.name: spec.shape for spec in weight_specs(config) if spec.name not in (EMBEDDING, D2T)}
    assert {name: tuple(tensor.shape) for name, tensor in new.items()} == shapes
    theirs = weights(target)
    for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
        assert torch.equal(new[f"model.layers.1.{part}.weight"], read_tensor(theirs[f"model.layers.3.{part}.weight"]))
    up = "mlp.up_proj.weight"
    assert torch.equal(new[f"model.layers.0.{up}"], read_tensor(theirs[f"model.layers.1.{up}"]))
    assert public_name("model.layers.1.mlp.up_proj.weight") == "layers.1.mlp.up_proj.weight"


def test_a_p_eagle_head_that_is_trained_further_keeps_its_kind(tmp_path):
    target = resolve("pico://llama?layers=4", base=tmp_path, cache=tmp_path / "cache")
    root = write_head(tmp_path / "head", P_EAGLE, Parts(layer="layers.0.", layers=3, mask_hidden=True))
    source = P_EAGLE | {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}
    (root / "config.json").write_text(json.dumps(source))
    start = fit(target, resolve(str(root), base=tmp_path, cache=tmp_path / "cache", role="draft"))
    again = fitted(target.config, config_of(continued_config(target, start, 128), "head"))
    assert (again.draft_kind.method, again.layers, again.eagle3.mask_token) == ("p_eagle", 3, 1)
    assert not again.eagle3.norm_before_residual


def test_continued_config_names_every_switch_of_the_start(tmp_path):
    """A head of speculators, trained further, is written flat: its defaults would be read otherwise there."""
    target = resolve("pico://llama?layers=4", base=tmp_path, cache=tmp_path / "cache")
    config = SPECULATORS | {"eagle_aux_hidden_state_layer_ids": [0, 2, 4], "norm_output": True}
    root = write_head(tmp_path / "head", config, Parts(layer="layers.0.", options=("fc_norm",)))
    start = fit(target, resolve(str(root), base=tmp_path, cache=tmp_path / "cache", role="draft"))
    written = continued_config(target, start, 128)
    again = fitted(target.config, config_of(written, "head"))
    assert replace(again.eagle3, writer="", written=None) == replace(start.config.eagle3, writer="", written=None)
    assert again.eagle3.writer == "tandem"
    assert not {"speculators_config", "transformer_layer_config", "tensors", "shares_embedding"} & written.keys()
