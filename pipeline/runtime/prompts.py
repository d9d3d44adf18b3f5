"""Prefill calls that read prompts: which rows share a graph, and which part of each prompt a call reads. Plain data.

A prompt is read in parts: the largest bucket first, the rest in the smallest that fits it. A part begins with the last
token of the part before it, which is read again (`speculation.phases.prefill`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.graphs.spec import GraphSpec

CALL_TOKENS = 16
"""Tokens that take about as long as a call by itself: it reads all weights once."""


@dataclass(frozen=True)
class Part:
    """The next part of a row's prompt: tokens from `start` up to `end`."""

    slot: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Call:
    """A prefill graph and the parts that it reads."""

    graph: GraphSpec
    parts: tuple[Part, ...]


def next_part(slot: int, read: int, end: int, graphs: Sequence[GraphSpec]) -> Part:
    """Return the next part of a prompt of which the caches hold `read` tokens and shall hold `end`."""
    start = max(min(read, end) - 1, 0)
    longest = max(graph.tokens for graph in _reading(graphs, start))
    return Part(slot, start, min(end, start + longest))


def calls_of(parts: Sequence[Part], graphs: Sequence[GraphSpec]) -> Iterator[Call]:
    """Yield calls that read all parts; rows that share a graph are chosen so that the least is computed.

    What a call computes is the tokens of its bucket, padding and rows without a part included.
    """
    for begins in (True, False):
        own = [part for part in parts if (part.start == 0) == begins]
        yield from _cheapest(sorted(own, key=lambda part: -part.tokens), _reading(graphs, 0 if begins else 1))


def _reading(graphs: Sequence[GraphSpec], start: int) -> list[GraphSpec]:
    """Return the graphs that read a part from `start` on: for empty rows those without a cache, where there are any."""
    prefill = [graph for graph in graphs if graph.phase == "prefill"]
    fresh = [graph for graph in prefill if not graph.continues]
    return fresh if fresh and start == 0 else [graph for graph in prefill if graph.continues]


def _cheapest(parts: Sequence[Part], graphs: Sequence[GraphSpec]) -> list[Call]:
    """Share out parts, the longest first: the best calls for the first n, for every n in turn."""
    best: list[tuple[int, list[Call]]] = [(0, [])]
    for count in range(1, len(parts) + 1):
        options = []
        for first in range(count):
            group = tuple(parts[first:count])
            graph = _smallest(graphs, len(group), group[0].tokens)
            if graph is not None:
                cost = best[first][0] + graph.batch * graph.tokens + CALL_TOKENS
                options.append((cost, [*best[first][1], Call(graph, group)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def _smallest(graphs: Sequence[GraphSpec], rows: int, tokens: int) -> GraphSpec | None:
    """Return the graph that computes the fewest tokens for so many rows of at most `tokens`; None: none holds them."""
    fits = (graph for graph in graphs if graph.batch >= rows and graph.tokens >= tokens)
    return min(fits, key=lambda graph: graph.batch * graph.tokens, default=None)
