"""Which prefill graphs read prompts: the fewest tokens computed, shown by trying every way."""

from itertools import combinations

import pytest

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.chunks import CALL_TOKENS, Chunk, next_chunk, prefill_calls

GRAPHS = [GraphSpec("prefill", batch, tokens, 1024) for batch in (1, 4, 8) for tokens in (64, 128, 256)]


def test_chunks_cover_a_prompt_and_read_the_last_token_before_them_again():
    chunks, read = [], 0
    while read < 600:
        chunks.append(next_chunk(3, read, 600, GRAPHS))
        read = chunks[-1].end
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 256), (255, 511), (510, 600)]
    assert next_chunk(0, 600, 600, GRAPHS) == Chunk(0, 599, 600)
    assert next_chunk(0, 600, 40, GRAPHS) == Chunk(0, 39, 40)


@pytest.mark.parametrize(
    "lengths", [(5,), (250, 20), (250, 240, 20, 10), (64, 64, 65, 128, 200, 1, 30, 256), (100,) * 5, (65, 60) * 4]
)
def test_rows_share_graphs_so_that_the_least_is_computed(lengths):
    chunks = [Chunk(slot, 10, 10 + length) for slot, length in enumerate(lengths)]
    calls = list(prefill_calls(chunks, GRAPHS))
    assert sorted(chunk.slot for call in calls for chunk in call.chunks) == list(range(len(lengths)))
    for call in calls:
        assert len(call.chunks) <= call.graph.batch
        assert max(chunk.tokens for chunk in call.chunks) <= call.graph.tokens
    assert sum(cost(call.graph) for call in calls) == least(sorted(lengths))


def test_a_call_costs_more_than_some_padding():
    """Three calls compute 24 tokens, one computes 32; each of them reads all weights."""
    graphs = [GraphSpec("prefill", batch, 8, 64) for batch in (1, 4)]
    (call,) = prefill_calls([Chunk(slot, 0, 8) for slot in range(3)], graphs)
    assert len(call.chunks) == 3


def cost(graph: GraphSpec) -> int:
    return graph.batch * graph.tokens + CALL_TOKENS


def least(lengths: list[int]) -> int:
    """The least over all ways to cut rows, in order of their lengths, into groups."""
    found = []
    for count in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), count):
            groups = [lengths[a:b] for a, b in zip((0, *cuts), (*cuts, len(lengths)), strict=True)]
            fits = [[g for g in GRAPHS if g.batch >= len(group) and g.tokens >= max(group)] for group in groups]
            found.append(sum(min(map(cost, each)) for each in fits))
    return min(found)


def test_empty_rows_have_graphs_without_a_cache_where_there_are_any():
    graphs = [*GRAPHS, GraphSpec("prefill", 4, 128, 128)]
    fresh, continued = prefill_calls([Chunk(0, 0, 100), Chunk(1, 70, 100), Chunk(2, 0, 4)], graphs)
    assert (fresh.graph.continues, [chunk.slot for chunk in fresh.chunks]) == (False, [0, 2])
    assert (continued.graph.continues, [chunk.slot for chunk in continued.chunks]) == (True, [1])
