"""The arithmetic of training."""

import pytest

from pipeline.artifact import host
from pipeline.distill import train


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", {"avx2", "avx512f"}, False),
        ("cpu", {"avx2", "avx512_bf16"}, True),
        ("cpu", {"asimd", "bf16"}, True),
        ("cuda", set(), True),
    ],
)
def test_training_multiplies_bfloat16_where_the_processor_can(monkeypatch, device, flags, expected):
    """It always did, and was 20 times slower on processors that emulate it."""
    monkeypatch.setattr(host, "processor_flags", lambda *_: frozenset(flags))
    assert train.has_bfloat16(device) is expected
