"""Lengths of the caches of layers with a sliding window: rings, where these are shorter. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.graphs.spec import GraphSpec, Ring
from pipeline.models.config import ModelConfig

CHUNK = 64
"""Rings have a multiple of so many slots: the attention kernel reads keys in chunks, none of which passes the end."""


def rings_of(models: Iterable[ModelConfig], graphs: Sequence[GraphSpec]) -> tuple[Ring, ...]:
    """Return the rings of a pair, by window: the window, and what one call writes or the gates go back by.

    So no call writes over a key that one of its queries sees, and no rejected draft over one that is seen later. A
    window has no ring that would not be shorter than the whole cache; heads over states have whole caches.
    """
    length, back = max(graph.kv for graph in graphs), _back(graphs)
    windows = {kind.window for config in models if config.eagle3 is None for kind in config.kinds}
    rings = (Ring(window, -(-(window - 1 + back) // CHUNK) * CHUNK) for window in sorted(filter(None, windows)))
    return tuple(ring for ring in rings if ring.slots + 1 < length)


def _back(graphs: Sequence[GraphSpec]) -> int:
    """Return the most positions between the first of a call and the end of what was written.

    The gates drive every graph again and again over the last positions of a bucket, from other rows and settings.
    """
    written = max(max(graph.tokens, graph.draft_tokens + 1) for graph in graphs)
    steps = max(graph.draft_tokens for graph in graphs) + 1
    return max(written, CHUNK + max(graph.batch for graph in graphs) + 8 * steps)
