"""Gate 2, greedy: does speculation change the output? On the shipped graphs, each of them.

Over prompts, through the engine: speculation against plain decode. Then at the end of every KV bucket, graph by graph:
each (batch, K, bucket) is driven from the same caches as plain decode until no position is left, so the last K
positions, where a step has less room than K, are visited by every graph. Stochastic graphs run there at temperature 0,
which must be greedy too. In low precision a difference is allowed at a near-tie only, and is counted.

Shapes: B rows, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine, Generation
from pipeline.runtime.lookup import Lookup
from pipeline.validate.gates.scoring import run_score, score


@dataclass(frozen=True)
class Difference:
    """A place where two graphs chose different tokens: who, where, and the gap of their logits over the largest."""

    graph: str
    prompt: str
    position: int
    plain: int
    speculative: int
    gap: float
    near_tie: bool


@dataclass
class Lossless:
    """What was compared. `tie` is the relative gap within which two logits are a near-tie."""

    tie: float
    tokens: int = 0
    differences: list[Difference] = field(default_factory=list)
    graphs: dict[str, int] = field(default_factory=dict)
    """Tokens compared, by graph, at the ends of buckets."""

    def failures(self, near_tie_rate: float) -> list[str]:
        """Why this gate fails; empty when it passes."""
        found = [
            f"{d.graph}: {d.prompt} differs from plain decode at position {d.position}, gap {d.gap:.1e}"
            for d in self.differences
            if not d.near_tie
        ]
        ties = len(self.differences) - len(found)
        if ties > near_tie_rate * self.tokens:
            found.append(f"near-tie differences {ties} of {self.tokens} tokens exceed the rate {near_tie_rate}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "tokens": self.tokens,
            "near_ties": sum(d.near_tie for d in self.differences),
            "tie_tolerance": self.tie,
            "differences": [vars(d) for d in self.differences],
            "edges": [{"graph": graph, "tokens": tokens} for graph, tokens in self.graphs.items()],
        }


@dataclass
class Row:
    """A cache row being driven: its history. All but the last token are in the caches."""

    tokens: list[int]
    start: int

    @property
    def new(self) -> list[int]:
        """Tokens since the start."""
        return self.tokens[self.start :]


def compare_prompts(
    engine: Engine, names: Sequence[str], prompts: Sequence[list[int]], plain: Sequence[Generation],
    speculative: Sequence[Generation], how: str, found: Lossless,
) -> None:  # fmt: skip
    """Compare two runs of the engine over the same prompts."""
    for name, prompt, a, b in zip(names, prompts, plain, speculative, strict=True):
        found.tokens += len(a.tokens)
        _compare(engine, (how, name), prompt, (a.tokens, b.tokens), found)


def compare_edges(engine: Engine, kv: int, probes: Sequence[list[int]], found: Lossless) -> None:
    """Drive every graph of one KV bucket, whose caches hold the probes, over its last positions.

    Runs that follow each other start from different tokens: what the one before left in the caches is wrong for the
    next, so a graph that failed to write its own keys and values would be seen.
    """
    usable = min(kv, engine.length)
    steps = max(g.draft_tokens for g in engine.graphs)
    span = min(2 * (steps + 1) + 2, usable - 2)
    if span < 1:
        return
    compared: list[tuple[GraphSpec, int, list[Row], list[Row]]] = []
    for batch in sorted({g.batch for g in engine.graphs if g.phase == "decode"}):
        graphs = [g for g in engine.graphs if g.kv == kv and g.batch == batch and g.phase in ("decode", "speculate")]
        plain = next(g for g in graphs if g.phase == "decode")
        others = [g for g in graphs if g is not plain]
        starts = [_starts(probes, batch, usable - span, variant) for variant in range(len(others) + 1)]
        expected = [drive(engine, plain, plain, rows) for rows in starts]
        compared += [
            (spec, variant, expected[variant], drive(engine, spec, plain, starts[variant]))
            for variant, spec in enumerate(others)
        ]
    for spec, variant, wanted, got in compared:
        for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
            found.tokens += len(a.new)
            found.graphs[spec.name] = found.graphs.get(spec.name, 0) + len(a.new)
            where = (spec.name, f"end of bucket {kv}, row {index}, start {variant}")
            _compare(engine, where, a.tokens[: a.start], (a.new, b.new), found)


def fill(engine: Engine, kv: int, sequences: Sequence[list[int]]) -> None:
    """Put sequences into the caches of both models, a row each, through the `score` graphs of a bucket."""
    for model in ("target", "draft"):
        spec = next(g for g in engine.graphs if g.phase == "score" and g.model == model and g.kv == kv)
        run_score(engine, spec, sequences[: spec.batch], lambda row, first, logits: None)  # noqa: ARG005


def drive(engine: Engine, spec: GraphSpec, plain: GraphSpec, starts: Sequence[Row], limit: int | None = None,
          sampling: dict[str, torch.Tensor] | None = None, generator: torch.Generator | None = None,
          ) -> list[Row]:  # fmt: skip
    """Run one graph from `starts` until every row is full, or has `limit` new tokens.

    Greedy unless `sampling` gives temperature, top_k and top_p. `plain` is a decode graph of the same batch: it reads
    the token before the last one again, which tells the draft what came before.
    """
    rows = [Row(list(row.tokens), len(row.tokens)) for row in starts]
    usable = min(spec.kv, engine.length)
    step(engine, plain, [Row(row.tokens[:-1], 0) for row in rows], [True] * len(rows))
    while True:
        active = [len(r.tokens) - 1 < usable and (limit is None or len(r.new) < limit) for r in rows]
        if not any(active):
            return rows
        for row, new in zip(rows, step(engine, spec, rows, active, sampling, generator), strict=True):
            row.tokens.extend(new)


def step(
    engine: Engine, spec: GraphSpec, rows: Sequence[Row], active: Sequence[bool],
    sampling: dict[str, torch.Tensor] | None = None, generator: torch.Generator | None = None,
) -> list[list[int]]:  # fmt: skip
    """Run a decode or speculate graph once; new tokens of each row, none for those that are not active."""
    arguments = {
        "last_token": torch.tensor([row.tokens[-1] for row in rows], dtype=torch.int32),
        "position": torch.tensor([len(row.tokens) - 1 for row in rows], dtype=torch.int32),
        "active": torch.tensor(active),
        "copied": torch.tensor(
            [(_copies(row.tokens, spec.draft_tokens) + [-1] * spec.draft_tokens)[: spec.draft_tokens] for row in rows],
            dtype=torch.int32,
        ),
    }
    if spec.sampling == "stochastic":
        draws = 2 * spec.draft_tokens + 1 if spec.phase == "speculate" else 1
        arguments |= sampling or settings(len(rows), 0.0, 0, 1.0)
        arguments["uniforms"] = torch.rand(len(rows), draws, generator=generator or torch.Generator().manual_seed(0))
    out = engine.ranks.run(spec, arguments)
    if spec.phase == "decode":
        return [[int(token)] if on else [] for token, on in zip(out["token"], active, strict=True)]
    return [out["tokens"][row, : int(out["count"][row])].tolist() for row in range(len(rows))]


def _copies(tokens: list[int], steps: int) -> list[int]:
    """Copied drafts, right and wrong ones: of a whole step, of its first half, or none, by turns."""
    most = (0, (steps + 1) // 2, steps)[len(tokens) % 3]
    return Lookup().find(tokens, 1, most) or tokens[:most]


def settings(rows: int, temperature: float, top_k: int, top_p: float) -> dict[str, torch.Tensor]:
    """Sampling arguments, the same for all rows."""
    return {
        "temperature": torch.full((rows,), temperature),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((rows,), top_p),
    }


def _starts(probes: Sequence[list[int]], batch: int, place: int, variant: int) -> list[Row]:
    """Ragged rows at and just before `place`; their last token is taken from elsewhere in the probe."""
    rows = []
    for index, probe in enumerate(probes[:batch]):
        at = max(place - index, 1)
        rows.append(Row([*probe[:at], probe[(7 * at + 13 * variant + index) % len(probe)]], 0))
    return rows


def _compare(
    engine: Engine, where: tuple[str, str], prefix: list[int], tokens: tuple[list[int], list[int]], found: Lossless
) -> None:
    """Note the first difference, and every token of the second run after it that is not the target's own choice."""
    plain, other = tokens
    pairs = zip(plain, other, strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(plain), len(other)))
    if at == len(plain) == len(other):
        return
    if at == min(len(plain), len(other)):
        longer = plain[at] if at < len(plain) else -1
        end = other[at] if at < len(other) else -1
        found.differences.append(Difference(*where, len(prefix) + at, longer, end, float("inf"), near_tie=False))
        return
    found.differences += list(_judge(engine, where, prefix, (plain, other), at, found.tie))


def _judge(
    engine: Engine, where: tuple[str, str], prefix: list[int], tokens: tuple[list[int], list[int]], at: int, tie: float
) -> Iterator[Difference]:
    """Teacher-force the second run, and tell wherever it left the target's own choice by how much."""
    plain, other = tokens
    sequence = [*prefix, *other]
    specs = [g for g in engine.graphs if g.phase == "score" and g.model == "target" and g.kv >= len(sequence) - 1]
    logits_TV = score(engine, min(specs, key=lambda g: g.kv), [sequence[:-1]])[0][len(prefix) - 1 :]
    for place in range(at, len(other)):
        rivals = (plain[at], other[at]) if place == at else (other[place],)
        best, scale = float(logits_TV[place].max()), float(logits_TV[place].abs().max())
        gap = max(best - float(logits_TV[place, token]) for token in rivals) / scale
        if place == at or gap > 0:
            wanted = plain[at] if place == at else int(logits_TV[place].argmax())
            yield Difference(*where, len(prefix) + place, wanted, other[place], gap, near_tie=gap <= tie)
