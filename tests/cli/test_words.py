"""Sizes, times and values for people."""

from __future__ import annotations

import pytest

from pipeline.cli.words import counted, moment, number, size, value


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1016 << 20, "1.0 GiB"),
        (11_320_000, "10.8 MiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_size(size_bytes, said):
    assert size(size_bytes) == said


def test_counted_has_one_and_many():
    assert [counted(1, "graph"), counted(0, "graph"), counted(1200, "graph")] == ["1 graph", "0 graphs", "1,200 graphs"]


def test_moment_leaves_out_seconds():
    assert moment("2026-11-28T20:56:05Z") == "2026-11-28 20:56"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"device": "cpu", "isa": "avx2"}, "device cpu, isa avx2"),
        ([1, 4], "1, 4"),
        ((), "none"),
        (None, "none"),
        (True, "yes"),
        (0.1 + 0.2, "0.3"),
        ("sha256:" + "ab" * 32, "ab" * 6),
        ({"gates": {"parity": []}}, "gates parity none"),
    ],
)
def test_value_has_no_brackets_and_no_long_digits(found, said):
    """`inspect` printed Python dicts, `diff` floats of 17 digits."""
    assert value(found) == said


def test_number_keeps_three_digits():
    assert [number(x) for x in (0, 1.0712345, 123456.7, 0.00001234, 1e9)] == [
        "0",
        "1.07",
        "123,457",
        "1.23e-05",
        "1.00e+09",
    ]
