"""Teacher forcing: logits of the shipped `score` graphs for tokens that are known.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.graphs.arguments import ScoreRow, score_arguments
from pipeline.graphs.signature import EXPERTS_OUT
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine


def run_score(
    engine: Engine, spec: GraphSpec, sequences: Sequence[list[int]], keep: Callable[[int, int, Tensor], None],
    first: Sequence[int] | None = None, keep_experts: Callable[[int, int, Tensor], None] | None = None,
) -> None:  # fmt: skip
    """Teacher-force up to B sequences, in chunks of T; `keep` gets row, offset in the sequence, logits [t, V].

    Rows start empty, or at the positions `first`, up to which the caches are filled. `keep_experts` gets the experts of
    the same tokens, int32 [t, L, C], from graphs with experts.
    """
    begins = first or [0] * len(sequences)
    for start in range(0, max(map(len, sequences)), spec.tokens):
        parts = [sequence[start : start + spec.tokens] for sequence in sequences]
        rows = {row: ScoreRow(part, begins[row] + start) for row, part in enumerate(parts) if part}
        outputs = engine.ranks.run(spec, score_arguments(spec, rows, engine.length))
        for row, scored in rows.items():
            keep(row, start, outputs["logits"][row, : len(scored.tokens)])
            if keep_experts is not None and EXPERTS_OUT in outputs:
                keep_experts(row, start, outputs[EXPERTS_OUT][row, : len(scored.tokens)])


def score(
    engine: Engine, spec: GraphSpec, sequences: Sequence[list[int]], first: Sequence[int] | None = None
) -> list[Tensor]:
    """Return logits float32 [T, V] of up to B sequences, whole or from the tokens `first` on, before which caches hold.

    Recurrent states are not those before any token, so they are computed again from the start.
    """
    if first is not None:
        if engine.manifest.pair.replayed:
            whole = score(engine, spec, sequences)
            return [logits[begin:] for logits, begin in zip(whole, first, strict=True)]
        sequences = [sequence[begin:] for sequence, begin in zip(sequences, first, strict=True)]
    parts: list[list[Tensor]] = [[] for _ in sequences]
    run_score(engine, spec, sequences, lambda row, _, logits: parts[row].append(logits.clone()), first)
    return [torch.cat(pieces) for pieces in parts]
