"""Prefill calls that read prompts: which rows share a graph, and which chunk of each prompt a call reads. Plain data.

A prompt is read in chunks: the largest bucket first, the rest in the smallest that fits it. A chunk begins with the
last token of the chunk before it, which is read again (`speculation.phases.prefill`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.graphs.spec import GraphSpec

CALL_TOKENS = 16
"""Tokens that take about as long as a call by itself: it reads all weights once."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a row's prompt: from `start` up to `end`."""

    slot: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class PrefillCall:
    """A prefill graph and the chunks that it reads, one for each row that it uses."""

    graph: GraphSpec
    chunks: tuple[Chunk, ...]


def next_chunk(slot: int, read: int, end: int, graphs: Sequence[GraphSpec]) -> Chunk:
    """Return the next chunk of a prompt of which the caches hold `read` tokens and shall hold `end`."""
    start = max(min(read, end) - 1, 0)
    longest = max(graph.tokens for graph in _reading(graphs, start))
    return Chunk(slot, start, min(end, start + longest))


def prefill_calls(chunks: Sequence[Chunk], graphs: Sequence[GraphSpec]) -> Iterator[PrefillCall]:
    """Yield calls that read all chunks; rows that share a graph are chosen so that the least is computed.

    What a call computes is the tokens of its bucket, padding and rows without a chunk included.
    """
    for begins in (True, False):
        own = [chunk for chunk in chunks if (chunk.start == 0) == begins]
        yield from _cheapest(sorted(own, key=lambda chunk: -chunk.tokens), _reading(graphs, 0 if begins else 1))


def _reading(graphs: Sequence[GraphSpec], start: int) -> list[GraphSpec]:
    """Return the graphs that read a chunk from `start` on: of an empty row those without a cache, if there are any."""
    prefill = [graph for graph in graphs if graph.phase == "prefill"]
    fresh = [graph for graph in prefill if not graph.continues]
    return fresh if fresh and start == 0 else [graph for graph in prefill if graph.continues]


def _cheapest(chunks: Sequence[Chunk], graphs: Sequence[GraphSpec]) -> list[PrefillCall]:
    """Share out chunks, the longest first: the best calls for the first n, for every n in turn."""
    best: list[tuple[int, list[PrefillCall]]] = [(0, [])]
    for count in range(1, len(chunks) + 1):
        options = []
        for first in range(count):
            group = tuple(chunks[first:count])
            graph = _smallest(graphs, len(group), group[0].tokens)
            if graph is not None:
                cost = best[first][0] + graph.batch * graph.tokens + CALL_TOKENS
                options.append((cost, [*best[first][1], PrefillCall(graph, group)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def _smallest(graphs: Sequence[GraphSpec], rows: int, tokens: int) -> GraphSpec | None:
    """Return the graph that computes the fewest tokens for so many rows of at most `tokens`; None: none holds them."""
    fits = (graph for graph in graphs if graph.batch >= rows and graph.tokens >= tokens)
    return min(fits, key=lambda graph: graph.batch * graph.tokens, default=None)
