"""Teacher forcing: logits of the shipped `score` graphs for tokens that are known.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine


def run_score(
    engine: Engine, spec: GraphSpec, sequences: Sequence[list[int]], keep: Callable[[int, int, Tensor], None],
    first: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Teacher-force up to B sequences, in chunks of T; `keep` gets row, offset in the sequence, logits [t, V].

    Rows start empty, or at the positions `first`, up to which the caches are filled.
    """
    begins = first or [0] * len(sequences)
    for start in range(0, max(map(len, sequences)), spec.tokens):
        tokens = torch.zeros(spec.batch, spec.tokens, dtype=torch.int32)
        position = torch.full((spec.batch,), engine.length, dtype=torch.int32)
        sizes = [len(sequence[start : start + spec.tokens]) for sequence in sequences]
        for row, (sequence, size) in enumerate(zip(sequences, sizes, strict=True)):
            if size:
                tokens[row, :size] = torch.tensor(sequence[start : start + size], dtype=torch.int32)
                position[row] = begins[row] + start
        logits = engine.ranks.run(spec, {"tokens": tokens, "position": position})["logits"]
        for row, size in enumerate(sizes):
            if size:
                keep(row, start, logits[row, :size])


def score(
    engine: Engine, spec: GraphSpec, sequences: Sequence[list[int]], first: Sequence[int] | None = None
) -> list[Tensor]:
    """Logits float32 [T, V] of up to B sequences, whole."""
    parts: list[list[Tensor]] = [[] for _ in sequences]
    run_score(engine, spec, sequences, lambda row, _, logits: parts[row].append(logits.clone()), first)
    return [torch.cat(pieces) for pieces in parts]
