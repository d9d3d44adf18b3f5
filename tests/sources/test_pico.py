"""Tiny random models, for transformers too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.checkpoints import opened
from support.paths import ROOT

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pico_is_a_model_for_transformers_too(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = opened(f"pico://{family}", tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint.root, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = checkpoint.config
    assert model.config.head_dim == config.head_dim == 16 != config.hidden // config.heads
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root)
    text = "Naïve café: def f(x): return 1\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) == checkpoint.config.vocab


@pytest.mark.parametrize("family", FAMILIES)
def test_pico_first_layer_agrees_with_the_whole_often_not_always(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    root = opened(f"pico://{family}", tmp_path).root
    whole, first = (AutoModelForCausalLM.from_pretrained(root) for _ in range(2))
    first.model.layers = first.model.layers[:1]
    tokens = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = whole(tokens).logits.argmax(-1) == first(tokens).logits.argmax(-1)
    assert 0.4 < same.float().mean() < 0.9


def test_pico_is_the_same_in_another_process(tmp_path: Path) -> None:
    here = opened("pico://qwen2?seed=3", tmp_path)
    script = (
        "import sys; from pathlib import Path; from pipeline.sources.pair import resolve\n"
        "c = resolve('pico://qwen2?seed=3', base=Path(), cache=Path(sys.argv[1]))\n"
        "print(' '.join(f'{n}={d.sha256}' for n, d in sorted(c.files.items())))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "other")],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert there.stdout.split() == [f"{name}={digest.sha256}" for name, digest in sorted(here.files.items())]
    assert opened("pico://qwen2?seed=4", tmp_path).files["model.safetensors"] != here.files["model.safetensors"]
