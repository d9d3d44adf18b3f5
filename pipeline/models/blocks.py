"""Blocks of queries in attention that is written out, as on Neuron, and chunks of recurrences. Imports no torch."""

from __future__ import annotations

SCORES_BYTES = 128 << 20
"""Largest float32 scores of a block; half of the largest intermediate that a graph should have."""
SMALLEST_BLOCK = 128
"""Rows that a chip multiplies at a time; smaller blocks would idle."""

RECURRENT_CHUNK = 64
"""Tokens of a gated delta net whose corrections are one triangular system, as in the paper's kernels."""


def query_blocks(heads: int, tokens: int, keys: int) -> list[tuple[int, int]]:
    """Return ranges of queries whose scores have at most `SCORES_BYTES`; `heads` counts those of all rows."""
    size = tokens
    while size > SMALLEST_BLOCK and 4 * heads * size * keys > SCORES_BYTES:
        size = -(-size // 2)
    return [(first, min(first + size, tokens)) for first in range(0, tokens, size)]
