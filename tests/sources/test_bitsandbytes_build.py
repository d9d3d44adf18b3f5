"""Builds of checkpoints whose matrices bitsandbytes stored in 4 bits: from the command line, through all gates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from pipeline.runtime.open import load as open_artifact
from support.families import Family, write_pair
from support.quantisers import bnb_config

pytestmark = [pytest.mark.compile, pytest.mark.slow]

RECIPE = """
name: four-bits
target: {{source: ./target, dtype: {dtype}}}
draft: {{derive: {{from: target, layers: [0]}}}}
speculation: {{draft_tokens: [2], sampling: [greedy, stochastic]}}
shapes: {{batch: [2], prefill: [16], kv: [48]}}
validate: {{prompts: prompts.jsonl, max_new_tokens: 10, gates: {{tokens_per_step: 1.0}}}}
"""
LLAMA = Family("Llama", {"intermediate_size": 128, "tie_word_embeddings": False}, "json-config", saved=torch.bfloat16)
BUILD = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "build", "pair.yaml", "--out", "out"]
PROMPTS = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 8], [11, 30]]


def quantise(root: Path, *, double: bool) -> dict[str, torch.Tensor]:
    """Store the matrices of layers in nf4, by bitsandbytes' own functions; return all values as it dequantises them."""
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for file in sorted(root.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            stored[name] = values[name] = weight
            if name.endswith("_proj.weight"):
                codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
                stored[name], values[name] = codes, dequantize_4bit(codes, state)
                stored |= {f"{name}.{part}": tensor.clone() for part, tensor in state.as_dict(packed=True).items()}
                assert not torch.equal(values[name], weight)
        file.unlink()
    (root / "model.safetensors.index.json").unlink()
    save_file(stored, root / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = bnb_config(bnb_4bit_use_double_quant=double)
    (root / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize(("dtype", "double"), [("float32", True), ("bfloat16", False)])
def test_a_build_of_nf4_passes_all_gates(tmp_path: Path, dtype: str, double: bool) -> None:
    """The gates compare with the dequantised weights, and the tokens are those of these weights in transformers."""
    write_pair(LLAMA, tmp_path)
    values = quantise(tmp_path / "target", double=double)
    (tmp_path / "pair.yaml").write_text(RECIPE.format(dtype=dtype))
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["The quick", "def add(", "a"])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = subprocess.run(BUILD, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "the checkpoint's bitsandbytes weights are dequantised" in built.stderr
    report = json.loads((tmp_path / "out" / "reports" / "parity.json").read_text(encoding="utf-8"))
    assert report["passed"]
    assert [gate["name"] for gate in report["gates"]] == ["parity", "losslessness", "distribution", "acceptance"]
    assert report["parity"]["target"]["error_over_noise"] < 4
    with open_artifact(tmp_path / "out") as engine:
        answers = [answer.tokens for answer in engine.generate(PROMPTS, max_new_tokens=12)]
    check_tokens(tmp_path / "target", values, answers, allowed=0 if dtype == "float32" else 2**-5)


def check_tokens(root: Path, values: dict[str, torch.Tensor], answers: list[list[int]], allowed: float) -> None:
    """Each token is the choice of transformers with the dequantised weights, in float32, or nearly."""
    config = json.loads((root / "config.json").read_text())
    config.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    missing = model.load_state_dict({name: tensor.float() for name, tensor in values.items()}, strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert bool((gaps <= allowed * logits.abs().amax(-1)).all()), gaps
