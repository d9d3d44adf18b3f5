"""The arithmetic of training."""

import pytest
import torch

from pipeline.distill.train import has_bfloat16


@pytest.mark.parametrize(
    ("device", "capabilities", "expected"),
    [
        ("cpu", {"avx2": True, "avx512_bf16": False}, False),
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"architecture": "aarch64", "bf16": True}, True),
        ("cuda", {}, True),
    ],
)
def test_training_multiplies_bfloat16_where_the_processor_can(monkeypatch, device, capabilities, expected):
    """It always did, and was 20 times slower on processors that emulate it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16(device) is expected
