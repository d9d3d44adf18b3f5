"""Heads that speculators and SpecForge wrote: their reading, and logits of two drafts in a row (`make test-drafts`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import fitted
from pipeline.models.families import config_of
from pipeline.models.weights import EMBEDDING, weight_specs
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation.chains import Batch, guesses
from support.heads import SIZES
from support.paths import ROOT

pytestmark = [pytest.mark.drafts, pytest.mark.usefixtures("one_thread")]

PYTHON = Path(os.environ.get("TANDEM_DRAFTS_PYTHON", ROOT / ".venv-drafts/bin/python"))
TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12}, "target")
USUAL = (2, 6, 9)
RESIDUAL = "norm_before_residual"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of both tools, written in their own environment."""
    out = tmp_path_factory.mktemp("written")
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([PYTHON, ROOT / "tests/support/public_heads.py", out], check=True, env=environment)
    return out


CASES = {
    "speculators": ("speculators", USUAL, (RESIDUAL,)),
    "speculators-plain": ("speculators", USUAL, ()),
    "speculators-qwen3": ("speculators", USUAL, (RESIDUAL,)),
    "speculators-bias": ("speculators", USUAL, (RESIDUAL,)),
    "speculators-3.1": ("speculators", (1, 3, 6, 9, 12), ("fc_norm", "norm_output")),
    "speculators-before-fc": ("speculators", USUAL, ("norm_before_fc",)),
    "speculators-whole": ("speculators", USUAL, (RESIDUAL,)),
    "specforge": ("specforge", USUAL, ()),
    "specforge-ids": ("specforge", (1, 6, 9), ()),
    "specforge-3.1": ("specforge", (1, 6, 9), ("fc_norm",)),
    "specforge-wide": ("specforge", USUAL, ()),
    "specforge-whole": ("specforge", USUAL, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_head_is_read_as_its_tool_runs_it(name, written, tmp_path):
    draft = resolve(str(written / name), base=tmp_path, cache=tmp_path / "cache", role="draft")
    config = fitted(TARGET, draft.config)
    head = config.eagle3
    on = tuple(s for s in (RESIDUAL, "norm_before_fc", "fc_norm", "norm_output") if getattr(head, s))
    assert (head.writer, head.taps, on) == CASES[name]
    refs = weights(draft)
    loaded = {spec.name: read_tensor(refs[spec.name]) for spec in weight_specs(config) if spec.name in refs}
    assert EMBEDDING in loaded
    reference = load_file(written / name / "reference.safetensors")
    for step, (ours, theirs) in enumerate(zip(logits_of(config, loaded, reference), reference["logits"], strict=True)):
        known = len(theirs) - step  # later slots have read beyond the text
        difference = (ours[:known] - theirs[:known]).abs().max()
        assert difference < 1e-4, f"draft {step + 1}: largest difference {difference}"


def logits_of(config: ModelConfig, loaded: dict[str, Tensor], reference: dict[str, Tensor]) -> list[Tensor]:
    """The logits of two drafts in a row from every slot, [T, V] each."""
    tokens, states = reference["tokens"], reference["states"]
    length = len(states)
    padded = torch.cat((tokens, torch.zeros(3, dtype=torch.long)))[None]
    more = torch.cat((states, torch.zeros(3, states.shape[1])))[None]
    batch = Batch(padded, more, more, torch.ones(1, length + 3, dtype=torch.bool))
    with torch.no_grad():
        return [guess.logits_MV[:length] for guess in guesses(config, loaded, batch, 2)]
