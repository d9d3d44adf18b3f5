"""Run single graphs from chosen cache rows, independently of the engine's loop. Compares nothing.

Shapes: B rows, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.graphs.arguments import GREEDY, NO_DRAW, Choice, Draw, StepRow, step_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.runtime.lookup import Lookup
from pipeline.validate.gates.scoring import run_score


@dataclass
class Row:
    """A cache row being driven: its history. All but the last token are in the caches."""

    tokens: list[int]
    start: int = 0

    @property
    def new(self) -> list[int]:
        """Tokens since the start."""
        return self.tokens[self.start :]


@dataclass(frozen=True)
class Draws:
    """How stochastic graphs draw: the choice of all rows, and where random numbers come from."""

    choice: Choice
    generator: torch.Generator


def fill(engine: Engine, kv: int, sequences: Sequence[list[int]]) -> None:
    """Put sequences into the caches of both models, a row each, through the `score` graphs of a bucket."""
    for model in ("target", "draft"):
        spec = next(g for g in engine.graphs if g.phase == "score" and g.model == model and g.kv == kv)
        run_score(engine, spec, sequences[: spec.batch], lambda row, first, logits: None)  # noqa: ARG005


def drive(engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row]) -> list[Row]:
    """Run one graph greedily from `starts` until every row is full.

    `plain` is a decode graph of the same batch: it reads the token before the last one again, so that the draft has
    the preceding state.
    """
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    usable = min(spec.kv, engine.length)
    step(engine, plain, [Row(row.tokens[:-1]) for row in rows], [True] * len(rows))
    while any(active := [len(row.tokens) - 1 < usable for row in rows]):
        for row, new in zip(rows, step(engine, spec, rows, active), strict=True):
            row.tokens.extend(new)
    return rows


def step(
    engine: Engine, spec: GraphSpec, rows: Sequence[Row], active: Sequence[bool], draws: Draws | None = None
) -> list[list[int]]:
    """Run a decode or speculate graph once; new tokens of each row, none for those that are not active.

    Greedy without `draws`.
    """
    outputs = engine.ranks.run(spec, step_arguments(spec, dict(_step_rows(spec, rows, active, draws))))
    if spec.phase == "decode":
        return [[int(token)] if on else [] for token, on in zip(outputs["token"], active, strict=True)]
    return [outputs["tokens"][row, : int(outputs["count"][row])].tolist() for row in range(len(rows))]


def _step_rows(
    spec: GraphSpec, rows: Sequence[Row], active: Sequence[bool], draws: Draws | None
) -> Iterator[tuple[int, StepRow]]:
    """Yield the rows that are active, by slot."""
    draws = draws or Draws(GREEDY, torch.Generator().manual_seed(0))
    uniforms = torch.rand(len(rows), spec.draws, generator=draws.generator) if spec.sampling == "stochastic" else None
    for slot, (row, on) in enumerate(zip(rows, active, strict=True)):
        if on:
            draw = NO_DRAW if uniforms is None else Draw(draws.choice, uniforms[slot])
            yield slot, StepRow(row.tokens[-1], len(row.tokens) - 1, draw, _copies(row.tokens, spec.draft_tokens))


def _copies(tokens: list[int], steps: int) -> list[int]:
    """Return copied drafts, correct and wrong, in turn for a whole step, its first half, or none."""
    most = (0, (steps + 1) // 2, steps)[len(tokens) % 3]
    return Lookup().find(tokens, 1, most) or tokens[:most]
