"""vLLM's reading of a DFlash draft of `tandem distill`, from its files alone (`make test-vllm`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distill.block import block_config, read_block
from pipeline.distill.card import write_files
from pipeline.distill.head import initial
from pipeline.sources.pair import resolve

pytestmark = pytest.mark.vllm


def test_vllm_reads_a_block_draft_as_it_was_trained(tmp_path: Path) -> None:
    """Taps, mask, layout and sizes; no layer is causal: with `sliding_window_non_causal: false` both were."""
    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    target = resolve("pico://llama?layers=12", base=tmp_path, cache=tmp_path / "cache")
    config_json = block_config(target, 128, (2, 6, 9), 2, "org/target")
    ids = torch.linspace(2, 511, 128).long()
    write_files(
        tmp_path / "own", config_json, initial(target, read_block(config_json, target), ids, 0, (10, 11)), ids, "dflash"
    )
    found = SpeculatorsConfig.from_pretrained(tmp_path / "own")
    assert found.architectures == ["DFlashDraftModel"]
    assert found.eagle_aux_hidden_state_layer_ids == [2, 6, 9]
    read = {key: found.dflash_config[key] for key in ("mask_token_id", "sample_from_anchor", "target_layer_ids")}
    assert read == {"mask_token_id": 511, "sample_from_anchor": False, "target_layer_ids": [1, 5, 8]}
    assert (found.num_hidden_layers, found.draft_vocab_size, found.vocab_size) == (2, 128, 512)
    assert [_dflash_layer_causal(found, layer) for layer in range(2)] == [False, False]
