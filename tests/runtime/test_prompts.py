"""Which prefill graphs read prompts: the fewest tokens computed, shown by trying every way."""

from itertools import combinations

import pytest

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.prompts import CALL_TOKENS, Part, calls_of, next_part

GRAPHS = [GraphSpec("prefill", batch, tokens, 1024) for batch in (1, 4, 8) for tokens in (64, 128, 256)]


def test_parts_cover_a_prompt_and_read_the_last_token_before_them_again():
    parts, read = [], 0
    while read < 600:
        parts.append(next_part(3, read, 600, GRAPHS))
        read = parts[-1].end
    assert [(part.start, part.end) for part in parts] == [(0, 256), (255, 511), (510, 600)]
    assert next_part(0, 600, 600, GRAPHS) == Part(0, 599, 600)
    assert next_part(0, 600, 40, GRAPHS) == Part(0, 39, 40)


@pytest.mark.parametrize(
    "lengths", [(5,), (250, 20), (250, 240, 20, 10), (64, 64, 65, 128, 200, 1, 30, 256), (100,) * 5, (65, 60) * 4]
)
def test_rows_share_graphs_so_that_the_least_is_computed(lengths):
    parts = [Part(slot, 10, 10 + length) for slot, length in enumerate(lengths)]
    calls = list(calls_of(parts, GRAPHS))
    assert sorted(part.slot for call in calls for part in call.parts) == list(range(len(lengths)))
    for call in calls:
        assert len(call.parts) <= call.graph.batch
        assert max(part.tokens for part in call.parts) <= call.graph.tokens
    assert sum(cost(call.graph) for call in calls) == least(sorted(lengths))


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
    fresh, continued = calls_of([Part(0, 0, 100), Part(1, 70, 100), Part(2, 0, 4)], graphs)
    assert (fresh.graph.continues, [part.slot for part in fresh.parts]) == (False, [0, 2])
    assert (continued.graph.continues, [part.slot for part in continued.parts]) == (True, [1])
