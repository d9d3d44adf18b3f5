"""Random configs of every family: from files that transformers writes, through shards, to its logits.

The configs are those of `support.random_configs`, other ones than those that other tests write by hand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import SourceError
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.caches import empty_caches
from pipeline.models.config import ModelConfig
from pipeline.models.families import FAMILIES
from pipeline.models.parallel import Seams
from pipeline.models.rope import in_both_layouts
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.speculation.model import Model
from pipeline.stages.shard_files import shard_path, write_shards
from pipeline.validate.reading import check_reading
from support.random_configs import Config, random_config

pytestmark = pytest.mark.usefixtures("one_thread")

MODERN = int(transformers.__version__.split(".")[0]) >= 5
KNOWN = [family for family in FAMILIES if family in transformers.models.auto.configuration_auto.CONFIG_MAPPING]
LENGTH, MOST = 100, 9
"""Tokens of a text, and of its longest chunk."""

LIMITS = dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 1e-3)
"""Of recurrent layers: logits of transformers' own steps and of whole texts differ by up to 4e-4 with these weights."""


def written(config: Config, seed: int, root: Path) -> transformers.PreTrainedModel:
    """Save a random model of transformers, with its config as it was drawn."""
    torch.manual_seed(seed)
    read = config if MODERN else in_both_layouts(config, config["max_position_embeddings"])
    (root / "config.json").write_text(json.dumps(read), encoding="utf-8")
    hf_config = transformers.AutoConfig.from_pretrained(root)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        scalars = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
        for name, parameter in (*model.named_parameters(), *scalars):
            is_one = parameter.ndim == 1 and bool((parameter == 1).all())  # norms, but for 1 + weight
            parameter.copy_(torch.randn_like(parameter) * 0.2 + is_one)
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 3 - 2)
    model.save_pretrained(root)
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def loaded(checkpoint: Checkpoint, root: Path) -> Model:
    """Our model of a checkpoint, from the shard of a single rank, with rings as short as windows and chunks allow."""
    config = checkpoint.config
    models = ModelsSpec(config, config, "float32", "float32", 1, draft_replicated=True)
    write_shards(models, checkpoint, checkpoint, root, packing=PlainPacking())
    weights = load_file(shard_path(root, "target", 0, 1))
    state = empty_caches(config, 2, LENGTH + 1, torch.float32, replayed=2 * MOST)
    return Model(
        config, weights, {name: ring(name, t, config) for name, t in state.items()}, Seams(), length=LENGTH + 1
    )


def ring(name: str, cache: Tensor, config: ModelConfig) -> Tensor:
    """A cache of garbage, in place of keys of other requests."""
    part, _, layer = name.partition(".")
    if part in ("k", "v") and (window := config.layer(int(layer)).window):
        cache = cache[:, :, : window + MOST]
    return torch.full_like(cache, 3)


def worst_error(drawn: Config, seed: int, root: Path) -> float:
    """The largest difference of logits, of texts that are read in chunks and one token at a time."""
    theirs, checkpoint = written(drawn, seed, root), open_checkpoint(root)
    check_reading(checkpoint)
    model = loaded(checkpoint, root / "shards")
    length = min(LENGTH, model.config.longest)
    tokens, draw, at, worst = torch.randint(0, model.config.vocab, (2, length)), random.Random(seed), 0, 0.0
    with torch.no_grad():
        expected = theirs(tokens).logits
        while at < length:
            count = min(draw.choice([1, 1, 2, 5, MOST]), length - at)
            positions = at + torch.arange(count).expand(2, count)
            hidden = model.hidden(tokens[:, at : at + count], positions, torch.tensor([True] * 2), LENGTH)
            got = model.logits(hidden.last_BTH)
            worst = max(worst, float((got - expected[:, at : at + count]).abs().max()))
            at += count
    return worst


def check(family: str, seeds: range, root: Path) -> None:
    """Configs that only transformers 5 reads as Tandem does are rejected by name before a build with 4.57."""
    for seed in seeds:
        (root / str(seed)).mkdir()
        try:
            error = worst_error(random_config(family, seed, modern=MODERN), seed, root / str(seed))
        except SourceError as refused:
            assert not MODERN
            assert "differently" in refused.what
            continue
        assert error < LIMITS.get(family, 2e-4), f"seed {seed}: max {error:.2e}"


@pytest.mark.parametrize("family", KNOWN)
def test_logits_of_random_configs_equal_transformers(family: str, tmp_path: Path) -> None:
    """Past the edges of every window, in rings of several turns, whatever rotary embedding the config has."""
    check(family, range(2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", KNOWN)
def test_logits_of_many_random_configs_equal_transformers(family: str, tmp_path: Path) -> None:
    check(family, range(2, 22), tmp_path)


@pytest.mark.skipif("gemma4_text" not in KNOWN, reason="transformers 4.57 has no class for it")
def test_logits_of_gemma4_whose_layers_all_see_all_keys(tmp_path: Path) -> None:
    """Was: layers of one kind were cut by the heads of layers with a window, which such a model does not have."""
    drawn = random_config("gemma4_text", 0)
    drawn |= {"layer_types": ["full_attention"] * drawn["num_hidden_layers"], "global_head_dim": drawn["head_dim"] + 4}
    assert worst_error(drawn, 0, tmp_path) < 2e-4
