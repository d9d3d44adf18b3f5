"""A recipe of `tandem init` builds, of a target whose weights are quantised."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pipeline.cli.main import main
from pipeline.sources.pico import Pico, write
from support.quantisers import fp8_blocks, quantised_modules


@pytest.mark.compile
@pytest.mark.slow
def test_build_of_an_initial_recipe_with_quantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gates compare the artifact with transformers' model of the dequantised weights."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    write(Pico("qwen3", layers=4), tmp_path / "m")
    quantise(tmp_path / "m")
    (tmp_path / "log.csv").write_text("prompt_tokens,completion_tokens\n60,30\n")
    prompts = [{"class": "chat", "prompt": f"the number {number} of"} for number in range(6)]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "default.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in prompts))
    run = CliRunner().invoke
    assert run(main, ["init", "./m", "--traffic", "log.csv"]).exit_code == 0
    recipe = tmp_path / "m-spec.yaml"
    recipe.write_text(re.sub(r"batch: \[1, 4\]", "batch: [1]", recipe.read_text()))
    built = run(main, ["build", "m-spec.yaml"])
    assert built.exit_code == 0, built.output
    assert "target: the checkpoint's fp8 weights are dequantised" in built.stderr
    assert "gates passed" in built.output
    assert "quantization_config" not in json.loads((tmp_path / "artifacts" / "m-spec" / "config.json").read_bytes())


def quantise(root: Path) -> None:
    """Quantise the projections of a checkpoint, in blocks of 32 rows and columns."""
    tool = fp8_blocks((32, 32))
    tensors = load_file(root / "model.safetensors")
    for module in quantised_modules(tensors):
        stored, _ = tool.pack(tensors.pop(f"{module}.weight"), torch.Generator())
        tensors |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "config.json").read_bytes()) | {"quantization_config": tool.config}
    (root / "config.json").write_text(json.dumps(config))
