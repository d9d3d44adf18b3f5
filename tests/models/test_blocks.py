"""Blocks of queries of attention that is written out."""

import pytest

from pipeline.models.blocks import SCORES_BYTES, SMALLEST_BLOCK, query_blocks


@pytest.mark.parametrize(("heads", "tokens"), [(1, 12288), (8, 2048), (32, 12288), (4, 1000)])
def test_query_blocks_cover_the_queries_within_the_limit(heads, tokens):
    blocks = query_blocks(heads, tokens, tokens)
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == tokens
    size = max(last - first for first, last in blocks)
    assert 4 * heads * size * tokens <= SCORES_BYTES or size <= SMALLEST_BLOCK


def test_query_blocks_of_a_long_prompt_read_about_half_of_the_square():
    tokens = 12288
    assert sum((last - first) * last for first, last in query_blocks(1, tokens, tokens)) < 0.6 * tokens**2
    assert sum((last - first) * last for first, last in query_blocks(32, tokens, tokens)) < 0.51 * tokens**2
