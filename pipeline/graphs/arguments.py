"""Build a graph's arguments for one call from rows, for every phase. Needs torch.

Rows are keyed by slot; a slot without a row runs as an inactive row, which changes no state.

Shapes: B rows of the graph's bucket, T tokens, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.spec import GraphSpec

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """How to choose a row's tokens: greedily at temperature 0; `top_k` 0 and `top_p` 1 keep every candidate."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Choice()


@dataclass(frozen=True)
class Draw:
    """How a row samples: its choice, and a seed below 2**64, which with a position decides the token there."""

    choice: Choice = GREEDY
    seed: int = 0


NO_DRAW = Draw()


@dataclass(frozen=True)
class StepRow:
    """A row of a `decode`, `speculate` or `propose` graph. `copied`: at most K tokens in place of the draft's own."""

    last_token: int
    position: int
    draw: Draw = NO_DRAW
    copied: Sequence[int] = ()


@dataclass(frozen=True)
class PromptRow:
    """A row of a `prefill` graph: a prompt, or a chunk of one from `position` on, and the cache row that it fills."""

    tokens: Sequence[int]
    slot: int
    draw: Draw = NO_DRAW
    position: int = 0


@dataclass(frozen=True)
class ScoreRow:
    """A row of a `score` graph: known tokens, the first at `position`."""

    tokens: Sequence[int]
    position: int


def step_arguments(spec: GraphSpec, rows: Mapping[int, StepRow]) -> Arguments:
    """Return the arguments of a `decode`, `speculate` or `propose` graph, and those of `verify` beside its own.

    Shapes: last_token, position int32 [B], active bool [B], copied int32 [B, K] (-1 where the draft proposes), and
    those of sampling.
    """
    last, position, active = [0] * spec.batch, [0] * spec.batch, [False] * spec.batch
    copied = [[-1] * spec.draft_tokens for _ in range(spec.batch)]
    for slot, row in rows.items():
        last[slot], position[slot], active[slot] = row.last_token, row.position, True
        copied[slot][: len(row.copied)] = list(row.copied)[: spec.draft_tokens]
    arguments = {"last_token": _int32(last), "position": _int32(position), "active": torch.tensor(active)}
    if spec.phase in ("speculate", "propose"):
        arguments["copied"] = _int32(copied)
    return arguments | _sampling(spec, {slot: row.draw for slot, row in rows.items()})


def prefill_arguments(spec: GraphSpec, prompts: Sequence[PromptRow], slots: int) -> Arguments:
    """Return the arguments of a `prefill` graph, rows in the order of `prompts`; the rest use free `slots`.

    Shapes: tokens int32 [B, T] right-padded, lengths int32 [B] (0 without a prompt), slots int32 [B], distinct, and
    position int32 [B] of a graph that continues prompts.
    """
    tokens = [[0] * spec.tokens for _ in range(spec.batch)]
    lengths, position = [0] * spec.batch, [0] * spec.batch
    for row, prompt in enumerate(prompts):
        tokens[row][: len(prompt.tokens)] = prompt.tokens
        lengths[row], position[row] = len(prompt.tokens), prompt.position
    used_slots = [prompt.slot for prompt in prompts]
    spare = [slot for slot in range(slots) if slot not in used_slots]
    arguments = {
        "tokens": _int32(tokens),
        "lengths": _int32(lengths),
        "slots": _int32((used_slots + spare)[: spec.batch]),
    }
    if spec.continues:
        arguments["position"] = _int32(position)
    return arguments | _sampling(spec, {row: prompt.draw for row, prompt in enumerate(prompts)})


def score_arguments(spec: GraphSpec, rows: Mapping[int, ScoreRow], scratch: int) -> Arguments:
    """Return the arguments of a `score` graph; slots without a row write to the `scratch` position.

    Shapes: tokens int32 [B, T] right-padded, position int32 [B], lengths int32 [B] (which graphs of models with
    recurrent layers take).
    """
    tokens = [[0] * spec.tokens for _ in range(spec.batch)]
    position, lengths = [scratch] * spec.batch, [0] * spec.batch
    for slot, row in rows.items():
        tokens[slot][: len(row.tokens)] = row.tokens
        position[slot], lengths[slot] = row.position, len(row.tokens)
    return {"tokens": _int32(tokens), "position": _int32(position), "lengths": _int32(lengths)}


def _sampling(spec: GraphSpec, draws: Mapping[int, Draw]) -> Arguments:
    """Return temperature, top_p float32 [B], top_k int32 [B], seed int32 [B, 2]; nothing for a greedy graph."""
    if spec.sampling == "greedy":
        return {}
    rows = [draws.get(slot, NO_DRAW) for slot in range(spec.batch)]
    choices = [row.choice for row in rows]
    return {
        "temperature": torch.tensor([choice.temperature for choice in choices]),
        "top_k": _int32([choice.top_k for choice in choices]),
        "top_p": torch.tensor([choice.top_p for choice in choices]),
        "seed": torch.tensor([_words(row.seed) for row in rows], dtype=torch.int32),
    }


def _words(seed: int) -> tuple[int, int]:
    """Return a seed as two int32 words, the lower one first."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def _int32(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
