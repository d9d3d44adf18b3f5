"""Teacher-forced logits and caches of the shipped `score` graphs, compared with goldens.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.answers import ScoredSequence, Sequences
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.scoring import run_score
from pipeline.validate.gates.token_columns import token_columns
from pipeline.validate.limits import MAP, TIE
from pipeline.validate.reference.golden import Golden, Summary, joined, project_cache, summary
from pipeline.validate.report.schema import SliceKind

SPREAD = 8
"""Prompts that are scored again in each further KV bucket, beside the probes."""

DRAFT_PROMPTS = 16
"""Prompts that the draft is scored on, beside the probes."""

POSITION_BINS = 16


@dataclass(frozen=True)
class ScoredRun:
    """One sequence in one graph: columns of its tokens, and sums of squares of its caches' errors and noise.

    `cache_squares` is float64 [error or noise, layers, key or value]; None where ranks share the heads.
    """

    sequence: ScoredSequence
    graph: str
    columns: dict[str, Tensor]
    cache_squares: Tensor | None


@dataclass(frozen=True)
class ModelScores:
    """All runs of one model, which has at least one wherever a property below is read."""

    model: str
    dtype: str
    runs: tuple[ScoredRun, ...] = ()

    def plus(self, runs: Sequence[ScoredRun]) -> ModelScores:
        """Return these runs and more."""
        return replace(self, runs=(*self.runs, *runs))

    @cached_property
    def floor(self) -> float:
        """Median over tokens of the noise of the largest logits, relative."""
        return float(torch.cat([run.columns["noise_5"] for run in self.runs]).median())

    @cached_property
    def layers_over_noise(self) -> tuple[tuple[float, float], ...]:
        """Error over noise of every layer's keys and values, root mean square; empty where ranks share the heads."""
        squares = [run.cache_squares for run in self.runs if run.cache_squares is not None]
        if not squares:
            return ()
        errors, noises = sum(squares[1:], squares[0])
        return tuple((keys, values) for keys, values in (errors / noises.clamp(min=1e-300)).sqrt().tolist())

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """All tokens, float64 columns; the ones that need all of them are filled in here."""
        table = {name: torch.cat([run.columns[name] for run in self.runs]) for name in self.runs[0].columns}
        sizes = torch.tensor([len(run.columns["position"]) for run in self.runs])
        table["run"] = torch.arange(len(self.runs)).repeat_interleave(sizes)
        floor = {k: table[f"noise_{k}"].median() for k in MAP}
        outlier = [table[f"error_{k}"] / torch.maximum(table[f"noise_{k}"], floor[k]).clamp(min=1e-300) for k in MAP]
        table["over_noise"] = torch.stack(outlier).amax(0)
        allowed = TIE * torch.maximum(table["noise_5"], floor[5])
        table["near_tie"] = table["flip"] * (table["gap_chosen"] <= allowed)
        return table

    def groups(self) -> Iterator[tuple[SliceKind, str, Tensor]]:
        """Yield slices of the table: kind, name, and the rows' mask."""
        index, position = self.table["run"], self.table["position"]
        graphs = [run.graph for run in self.runs]
        classes = [run.sequence.kind for run in self.runs]
        names = [run.sequence.name for run in self.runs]
        by_kind: dict[SliceKind, list[str]] = {"graph": graphs, "class": classes, "prompt": names}
        for kind, labels in by_kind.items():
            for label in dict.fromkeys(labels):
                yield kind, label, torch.tensor([other == label for other in labels])[index]
        longest = int(position.max()) + 1
        width = max(-(-longest // POSITION_BINS), 1)
        for start in range(0, longest, width):
            name = f"{start} to {min(start + width, longest) - 1}"
            yield "positions", name, (position >= start) & (position < start + width)

    def run_at(self, row: int) -> ScoredRun:
        """Return the run that a row of the table belongs to."""
        return self.runs[int(self.table["run"][row])]

    def place(self, row: int) -> str:
        """Return the name of the token of a row: its sequence, position and graph."""
        run = self.run_at(row)
        return f"{run.sequence.name}, position {int(self.table['position'][row])}, {run.graph}"


@dataclass(frozen=True)
class ScoreJob:
    """What one KV bucket scores of one model; `shorter` is the next smaller bucket."""

    model: str
    kv: int
    shorter: int


def score_bucket(
    inputs: GateInputs, job: ScoreJob, sequences: Sequences, goldens: Mapping[str, Golden]
) -> list[ScoredRun]:
    """Score prompts in their smallest buckets, some in larger ones; probes in each, last: they stay in the caches.

    Of a draft some prompts: the answers to all of them show what it proposes (`places.py`).
    """
    engine = inputs.engine
    spec = next(g for g in engine.graphs if (g.phase, g.model, g.kv) == ("score", job.model, job.kv))
    own = sequences.prompts if job.model == "target" else sequences.prompts[:: _every(sequences.prompts, DRAFT_PROMPTS)]
    every = _every(own, SPREAD)
    chosen = [s for i, s in enumerate(own) if len(s.tokens) > job.shorter or i % every == 0]
    chosen.sort(key=lambda s: len(s.tokens))
    usable = min(job.kv, engine.length)
    runs: list[ScoredRun] = []
    for group in (chosen, sequences.probes[: spec.batch]):
        pairs = [(replace(s, tokens=s.tokens[:usable]), goldens[s.name].cut(usable)) for s in group]
        for start in range(0, len(pairs), spec.batch):
            inputs.progress(spec.name, start, len(pairs))
            runs += _score_batch(engine, spec, pairs[start : start + spec.batch], inputs.dtype_of(job.model))
    inputs.progress(spec.name, 1, 1)
    return runs


def _every(items: Sequence[object], count: int) -> int:
    """Return the step at which `count` items or a few more are taken."""
    return max(len(items) // count, 1)


def _score_batch(
    engine: Engine, spec: GraphSpec, pairs: Sequence[tuple[ScoredSequence, Golden]], dtype: str
) -> Iterator[ScoredRun]:
    """Score up to B sequences through one graph at once, and compare each with its golden."""
    parts: list[list[Summary]] = [[] for _ in pairs]

    def keep(row: int, first: int, logits_TV: Tensor) -> None:
        ids = pairs[row][1].ids[first : first + len(logits_TV)]
        if len(ids):
            parts[row].append(summary(logits_TV[: len(ids)], ids))

    run_score(engine, spec, [sequence.tokens for sequence, _ in pairs], keep)
    state = engine.ranks.state()
    for row, ((sequence, golden), pieces) in enumerate(zip(pairs, parts, strict=True)):
        columns = token_columns(joined(pieces), golden, dtype)
        columns["position"] = torch.arange(len(columns["flip"]), dtype=torch.float64)
        squares = cache_squares(state, spec.model, row, golden) if state else None
        yield ScoredRun(sequence, spec.name, columns, squares)


def cache_squares(state: Mapping[str, Tensor], model: str, row: int, golden: Golden) -> Tensor:
    """Return sums of squares of errors and noise, of keys and values that a sequence left in a cache row."""
    tokens, layers = golden.caches.shape[:2]
    cached = torch.stack([_projected_layer(state, f"{model}/", layer, row, tokens) for layer in range(layers)], dim=1)
    both = torch.stack([cached - golden.caches, golden.caches_noise - golden.caches]).double()
    return both.pow(2).sum((1, 4))


def _projected_layer(state: Mapping[str, Tensor], prefix: str, layer: int, row: int, tokens: int) -> Tensor:
    parts = [project_cache(state[f"{prefix}{part}.{layer}"][row, :, :tokens].cpu()) for part in "kv"]
    return torch.stack(parts, dim=1)
