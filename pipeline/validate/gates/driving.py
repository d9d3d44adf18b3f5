"""Run single graphs from chosen cache rows, independently of the engine's loop. Compares nothing.

Shapes: B rows, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.graphs.arguments import GREEDY, Choice, Draw, StepRow, step_arguments
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.runtime.lookup import Lookup
from pipeline.validate.gates.scoring import run_score

UNUSED = 7
"""A seed that a greedy row must not use."""


@dataclass
class Row:
    """A cache row being driven: its history. All but the last token are in the caches."""

    tokens: list[int]
    start: int = 0

    @property
    def new(self) -> list[int]:
        """Tokens since the start."""
        return self.tokens[self.start :]


def fill(engine: Engine, kv: int, sequences: Sequence[list[int]]) -> None:
    """Put sequences into the caches of both models, a row each, through the `score` graphs of a bucket."""
    for model in ("target", "draft"):
        spec = next(g for g in engine.graphs if g.phase == "score" and g.model == model and g.kv == kv)
        if any(sequences):
            run_score(engine, spec, sequences[: spec.batch], lambda row, first, logits: None)  # noqa: ARG005


def drive(
    engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row], known: Sequence[Row] = ()
) -> list[Row]:
    """Run one graph greedily from `starts` until every row is full. `plain` is a decode graph of the same batch.

    `known` are the rows of decode steps: where the graph verifies copied tokens, some of these are right to the end.
    """
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    usable = min(spec.kv, engine.length)
    rewind(engine, plain, rows)
    while any(active := [len(row.tokens) - 1 < usable for row in rows]):
        copies = [copies_of(row.tokens, spec.draft_tokens, *known[slot : slot + 1]) for slot, row in enumerate(rows)]
        for row, new in zip(rows, step(engine, spec, rows, active, copies=copies), strict=True):
            row.tokens.extend(new)
    return rows


def rewind(engine: Engine, plain: GraphSpec, rows: Sequence[Row]) -> None:
    """Bring the draft to the state before the last token of rows, by a decode graph that reads the token before it.

    Twice: a head writes its keys one position late, from the features that the step before left. After the second
    step they are the same whatever ran earlier. Where the target has recurrent states, all is computed again from the
    first token on, and the features are those before this token.
    """
    is_recurrent = engine.manifest.pair.replayed > 0
    if is_recurrent:
        fill(engine, plain.kv, [row.tokens[:-2] for row in rows])
    for _ in range(1 if is_recurrent else 2):
        step(engine, plain, [Row(row.tokens[:-1]) for row in rows], [True] * len(rows))


def random_draws(choices: Sequence[Choice], generator: torch.Generator) -> list[Draw]:
    """Return how rows sample: their choices, with new seeds."""
    seeds = torch.randint(2**63 - 1, (len(choices),), generator=generator).tolist()
    return [Draw(choice, seed) for choice, seed in zip(choices, seeds, strict=True)]


def step(
    engine: Engine, spec: GraphSpec, rows: Sequence[Row], active: Sequence[bool], draws: Sequence[Draw] = (),
    copies: Sequence[list[int]] = (),
) -> list[list[int]]:  # fmt: skip
    """Run a decode or speculate graph once; new tokens of each row, none for those that are not active.

    `draws` are how each row samples; greedy without them. `copies` are proposed in place of the draft's tokens.
    """
    greedy = Draw(GREEDY, UNUSED)
    given = {
        slot: StepRow(
            row.tokens[-1],
            len(row.tokens) - 1,
            draws[slot] if draws else greedy,
            copies[slot] if copies else copies_of(row.tokens, spec.draft_tokens),
        )
        for slot, (row, on) in enumerate(zip(rows, active, strict=True))
        if on
    }
    outputs = engine.ranks.run(spec, step_arguments(spec, given))
    if spec.phase == "decode":
        return [[int(token)] if on else [] for token, on in zip(outputs["token"], active, strict=True)]
    return [outputs["tokens"][row, : int(outputs["count"][row])].tolist() for row in range(len(rows))]


def copies_of(tokens: list[int], steps: int, known: Row | None = None) -> list[int]:
    """Return copied drafts, correct and wrong, in turn for a whole step, its first half, or none.

    With the tokens that decode steps give, every second step copies these.
    """
    if known is not None and len(tokens) % 2 and known.tokens[: len(tokens)] == tokens:
        return known.tokens[len(tokens) :][:steps]
    most = (0, (steps + 1) // 2, steps)[len(tokens) % 3]
    return Lookup().find(tokens, 1, most) or tokens[:most]
