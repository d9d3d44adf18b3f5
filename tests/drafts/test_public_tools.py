"""Heads that speculators and SpecForge wrote: their reading, and logits of drafts in a row (`make test-drafts`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.distill.block import block_config, read_block
from pipeline.distill.card import write_files
from pipeline.distill.head import initial
from pipeline.errors import SourceError
from pipeline.models.config import Markov, ModelConfig
from pipeline.models.eagle3 import fitted
from pipeline.models.families import config_of
from pipeline.models.weights import EMBEDDING, HEAD, weight_specs
from pipeline.sources.pair import resolve
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import check_weights, weights
from pipeline.speculation import block_chains, chains
from pipeline.speculation.chains import Batch
from pipeline.validate.draft.agreement import Guesses
from support.heads import SIZES
from support.paths import ROOT

pytestmark = [pytest.mark.drafts, pytest.mark.usefixtures("one_thread")]

PYTHON = Path(os.environ.get("TANDEM_DRAFTS_PYTHON", ROOT / ".venv-drafts/bin/python"))
TARGET = config_of({"model_type": "llama", **SIZES, "num_hidden_layers": 12}, "target")
USUAL = (2, 6, 9)
RESIDUAL = "norm_before_residual"


def write_own(out: Path) -> None:
    """A new DFlash draft of `tandem distill` before its training."""
    target = resolve("pico://llama?layers=12", base=out, cache=out / "cache")
    config_json = block_config(target, 128, USUAL, 2, "org/target")
    ids = torch.linspace(2, 511, 128).long()
    tensors = initial(target, read_block(config_json, target), ids, 0, (10, 11))
    write_files(out / "tandem-dflash", config_json, tensors, ids, "dflash")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of both tools, written in their own environment."""
    out = tmp_path_factory.mktemp("written")
    write_own(out)
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


@pytest.mark.parametrize(
    ("name", "taps", "on"),
    [("speculators-p-eagle", USUAL, (RESIDUAL,)), ("speculators-p-eagle-3.1", (1, 3, 6, 9, 12), ("fc_norm",))],
)
def test_a_p_eagle_head_is_read_as_its_tool_runs_it(name, taps, on, written, tmp_path):
    """Logits of four draft tokens from all anchors that the tool's training samples."""
    draft = resolve(str(written / name), base=tmp_path, cache=tmp_path / "cache", role="draft")
    config = fitted(TARGET, draft.config)
    head = config.eagle3
    assert (head.writer, head.taps, head.mask_token, config.layers) == ("speculators", taps, 7, 3)
    assert tuple(s for s in (RESIDUAL, "norm_before_fc", "fc_norm") if getattr(head, s)) == on
    refs = weights(draft)
    loaded = {spec.name: read_tensor(refs[spec.name]) for spec in weight_specs(config)}
    reference = load_file(written / name / "reference.safetensors")
    by_depth = torch.stack(logits_of(config, loaded, reference, depths=4))
    ours = by_depth[reference["depth"], reference["anchor"]]
    assert set(reference["depth"].tolist()) == {0, 1, 2, 3}
    difference = (ours - reference["logits"]).abs().max()
    assert difference < 1e-4, f"largest difference {difference}"


def test_a_p_eagle_head_of_specforge_needs_its_mask_token(written, tmp_path):
    source = str(written / "specforge-p-eagle")
    with pytest.raises(SourceError, match="mask_token_id=null"):
        resolve(source, base=tmp_path, cache=tmp_path / "cache", role="draft")
    told = {"mask_token_id": 9}
    draft = resolve(source, base=tmp_path, cache=tmp_path / "cache", role="draft", readings=told)
    assert (draft.config.eagle3.writer, draft.config.eagle3.mask_token, draft.config.layers) == ("specforge", 9, 3)


@pytest.mark.parametrize(
    ("name", "writer", "causal"),
    [
        ("speculators-dflash", "speculators", (0,)),
        ("speculators-dflash-whole", "speculators", ()),
        ("specforge-dflash", "specforge", ()),
        ("speculators-dflash-anchor", "speculators", ()),
    ],
)
def test_a_dflash_draft_is_read_as_its_tool_runs_it(name, writer, causal, written, tmp_path):
    """Logits of the answers of blocks of four, from all anchors that the tool ran: of the masks, or of all four."""
    draft = resolve(str(written / name), base=tmp_path, cache=tmp_path / "cache", role="draft")
    config = fitted(TARGET, draft.config)
    head = config.eagle3
    assert (head.writer, head.taps, head.mask_token, head.block) == (writer, USUAL, 7, 4)
    assert head.causal_layers == causal
    refs = weights(draft)
    reference = load_file(written / name / "reference.safetensors")
    of_target = {name: reference[name] for name in (EMBEDDING, HEAD)}
    loaded = of_target | {spec.name: read_tensor(refs[spec.name]) for spec in weight_specs(config) if spec.name in refs}
    assert head.from_anchor == name.endswith("anchor")
    answers = 4 if head.from_anchor else 3
    by_depth = torch.stack(logits_of(config, loaded, reference, answers, block_chains.guesses))
    for anchor, theirs in zip(reference["anchor"].tolist(), reference["logits"], strict=True):
        difference = (by_depth[:, anchor - 1] - theirs[4 - answers :]).abs().max()
        assert difference < 1e-4, f"block at {anchor}: largest difference {difference}"


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("tool", ["speculators", "specforge"])
def test_a_dspark_draft_is_read_as_its_tool_runs_it(tool, kind, written, tmp_path):
    """Logits of all answers of blocks of four, each by the text's token before it, from all anchors that the tool ran.

    A gated head of speculators has the layout of DFlash here, the others predict from the newest token's position.
    """
    source = written / f"{tool}-dspark-{kind}"
    draft = resolve(str(source), base=tmp_path, cache=tmp_path / "cache", role="draft")
    config = fitted(TARGET, draft.config)
    head = config.eagle3
    in_place = (tool, kind) == ("speculators", "gated")
    assert (head.writer, head.taps, head.mask_token, head.block) == (tool, USUAL, 7, 4)
    assert (head.markov, head.from_anchor, head.confidence) == (Markov(kind, 16), not in_place, True)
    check_weights(draft)
    refs = weights(draft)
    reference = load_file(source / "reference.safetensors")
    of_target = {name: reference[name] for name in (EMBEDDING, HEAD)}
    loaded = of_target | {spec.name: read_tensor(refs[spec.name]) for spec in weight_specs(config) if spec.name in refs}
    answers = 3 if in_place else 4
    by_depth = torch.stack(logits_of(config, loaded, reference, answers, block_chains.guesses))
    for anchor, theirs in zip(reference["anchor"].tolist(), reference["logits"], strict=True):
        difference = (by_depth[:, anchor - 1] - theirs[4 - answers :]).abs().max()
        assert difference < 1e-4, f"block at {anchor}: largest difference {difference}"


def test_speculators_reads_a_dflash_draft_of_tandem_distill_as_it_is_read_here(written, tmp_path):
    """Logits of the seven masks of blocks of eight, in float32; the file has bfloat16."""
    draft = resolve(str(written / "tandem-dflash"), base=tmp_path, cache=tmp_path / "cache", role="draft")
    config, refs = fitted(TARGET, draft.config), weights(draft)
    reference = load_file(written / "tandem-dflash/reference.safetensors")
    loaded = {spec.name: read_tensor(refs[spec.name]).float() for spec in weight_specs(config) if spec.name in refs}
    loaded |= {EMBEDDING: reference[EMBEDDING]}
    by_depth = torch.stack(logits_of(config, loaded, reference, 7, block_chains.guesses))
    assert (config.draft_vocab, reference["anchor"].tolist()) == (128, [1, 2, 3])
    for anchor, theirs in zip(reference["anchor"].tolist(), reference["logits"], strict=True):
        difference = (by_depth[:, anchor - 1] - theirs[1:]).abs().max()
        assert difference < 1e-4, f"block at {anchor}: largest difference {difference}"


def logits_of(
    config: ModelConfig, loaded: dict[str, Tensor], reference: dict[str, Tensor], depths: int = 2,
    guesses: Guesses = chains.guesses,
) -> list[Tensor]:  # fmt: skip
    """The logits of drafts in a row from every slot, [T, V] each."""
    tokens, states = reference["tokens"], reference["states"]
    length = len(states)
    padded = torch.cat((tokens, torch.zeros(depths + 1, dtype=torch.long)))[None]
    more = torch.cat((states, torch.zeros(depths + 1, states.shape[1])))[None]
    batch = Batch(padded, more, more, torch.ones(1, length + depths + 1, dtype=torch.bool))
    with torch.no_grad():
        return [guess.logits_MV[:length] for guess in guesses(config, loaded, batch, depths)]
