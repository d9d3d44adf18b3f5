"""Rows of a batch must not change each other: a step is run again with other tokens, settings and seeds.

Exact, bit by bit: what a row emits is a function of its own arguments and caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pipeline.graphs.arguments import Draw
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.driving import Row, random_draws, rewind, step
from pipeline.validate.gates.judge import SETTINGS, setting_of

RUNS = 2
"""Steps that are repeated, each from other settings, for two of the rows."""


def dependent_rows(engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row]) -> Iterator[str]:
    """Yield a finding for each row whose tokens change with those, the settings or the seeds of the other rows.

    `plain` is a decode graph of the same batch.
    """
    rows = len(starts)
    if rows == 1:
        return
    generator = torch.Generator().manual_seed(rows)
    for run in range(RUNS):
        draws = [
            random_draws([SETTINGS[setting_of(row, of)] for row in range(rows)], generator) for of in (run, run + 1)
        ]
        first = _step(engine, spec, plain, starts, draws[0])
        for kept in {run % rows, rows - 1 - run % rows}:
            others = [row if number == kept else _other(row) for number, row in enumerate(starts)]
            mixed = [draws[number != kept][number] for number in range(rows)]
            if _step(engine, spec, plain, others, mixed)[kept] != first[kept]:
                yield f"row {kept} changes with the tokens, settings or seeds of other rows"
                return


def _step(
    engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row], draws: Sequence[Draw]
) -> list[list[int]]:
    rewind(engine, plain, starts)
    return step(engine, spec, starts, [True] * len(starts), draws)


def _other(row: Row) -> Row:
    """Return a row with another last token."""
    return Row([*row.tokens[:-1], row.tokens[len(row.tokens) // 2]])
