"""Teacher-forced logits and caches of the shipped `score` graphs, compared with goldens.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from pipeline.graphs.spec import GraphSpec, Role
from pipeline.models.config import ModelConfig
from pipeline.validate.gates.answers import ScoredSequence, Sequences
from pipeline.validate.gates.caches import CacheReader
from pipeline.validate.gates.expert_errors import ComparedExperts, ExpertSquares, compared_experts, expert_squares
from pipeline.validate.gates.experts import ChosenExperts, along, chosen_experts
from pipeline.validate.gates.inputs import MODELS, GateInputs
from pipeline.validate.gates.router_ties import RouterErrors
from pipeline.validate.gates.scoring import run_score
from pipeline.validate.gates.token_columns import token_columns
from pipeline.validate.limits import MAP, TIE
from pipeline.validate.reference.golden import Golden, Summary, joined, summary
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
    experts: ChosenExperts | None = None
    expert_squares: ExpertSquares | None = None


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

    @cached_property
    def router(self) -> RouterErrors | None:
        """Choices of experts; None without experts."""
        return RouterErrors.of(run.experts for run in self.runs)

    @cached_property
    def compared_experts(self) -> ComparedExperts:
        """Errors by expert; none without experts, or where ranks share the heads."""
        return compared_experts([run.expert_squares for run in self.runs])

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
    pairs = [(replace(s, tokens=s.tokens[:usable]), goldens[s.name].cut(usable)) for s in chosen]
    probes = [(replace(s, tokens=s.tokens[:usable]), goldens[s.name].cut(usable)) for s in sequences.probes]
    groups = (pairs, probes[: spec.batch])
    runs = _score_groups(inputs, spec, groups)
    others = along(inputs, job.model, {run.sequence.name: (run.sequence.tokens, run.experts) for run in runs})
    if others:
        runs = _score_groups(
            inputs, spec, [[(s, others.get(s.name, golden)) for s, golden in group] for group in groups]
        )
    return runs


def _score_groups(
    inputs: GateInputs, spec: GraphSpec, groups: Sequence[Sequence[tuple[ScoredSequence, Golden]]]
) -> list[ScoredRun]:
    """Score groups of sequences, each in batches, and compare them with their goldens."""
    runs: list[ScoredRun] = []
    for pairs in groups:
        for start in range(0, len(pairs), spec.batch):
            inputs.progress(spec.name, start, len(pairs))
            runs += _score_batch(inputs, spec, pairs[start : start + spec.batch])
    inputs.progress(spec.name, 1, 1)
    return runs


def _every(items: Sequence[object], count: int) -> int:
    """Return the step at which `count` items or a few more are taken."""
    return max(len(items) // count, 1)


def _score_batch(
    inputs: GateInputs, spec: GraphSpec, pairs: Sequence[tuple[ScoredSequence, Golden]]
) -> Iterator[ScoredRun]:
    """Score up to B sequences through one graph at once, and compare each with its golden."""
    engine = inputs.engine
    parts: list[list[Summary]] = [[] for _ in pairs]
    experts: list[list[Tensor]] = [[] for _ in pairs]
    state, config = engine.ranks.state(), routed_config(inputs, spec.model)
    caches = CacheReader(state, engine.manifest.pair, cast("Role", spec.model))

    def keep(row: int, first: int, logits_TV: Tensor) -> None:
        ids = pairs[row][1].ids[first : first + len(logits_TV)]
        if len(ids):
            parts[row].append(summary(logits_TV[: len(ids)], ids))
            caches.wrote(row, first, len(ids))

    def keep_experts(row: int, first: int, experts_TLC: Tensor) -> None:
        experts[row].append(experts_TLC[: max(len(pairs[row][1].ids) - first, 0)].clone())

    run_score(engine, spec, [sequence.tokens for sequence, _ in pairs], keep, keep_experts=keep_experts)
    for row, ((sequence, golden), pieces) in enumerate(zip(pairs, parts, strict=True)):
        columns = token_columns(joined(pieces), golden, inputs.dtype_of(spec.model))
        columns["position"] = torch.arange(len(columns["flip"]), dtype=torch.float64)
        chosen, squares, by_expert = chosen_experts(experts[row], golden, config), None, None
        if state:
            of_tokens = caches.errors(row, golden)
            squares = of_tokens.sum(1)
            if config is inputs.checkpoints[MODELS.index(spec.model)].config:
                logits = torch.stack([columns["square_error_all"], columns["square_noise_all"]])
                by_expert = expert_squares(of_tokens, logits, chosen, config)
        yield ScoredRun(sequence, spec.name, columns, squares, chosen, by_expert)


def along_scores(inputs: GateInputs, scores: ModelScores, goldens: Mapping[str, Golden]) -> dict[str, Golden]:
    """Return goldens along the experts of a graph that scored a sequence, by its name.

    Of several graphs it is the first that scored most of the sequence: others have shorter caches. `goldens` are those
    along the baseline's own experts; sequences with these are left out.
    """
    chosen: dict[str, tuple[list[int], ChosenExperts]] = {}
    for run in scores.runs:
        known = chosen.get(run.sequence.name)
        if run.experts is not None and (known is None or len(known[1].experts) < len(run.experts.experts)):
            own = goldens[run.sequence.name].cut(len(run.experts.experts)).routes
            assert own is not None
            chosen[run.sequence.name] = (run.sequence.tokens, replace(run.experts, routes=own))
    return along(inputs, scores.model, chosen)


def routed_config(inputs: GateInputs, model: str) -> ModelConfig:
    """Return the config of the model whose experts the `score` graphs of a model report: a head's are its target's."""
    target, draft = (checkpoint.config for checkpoint in inputs.checkpoints)
    return target if model == "target" or draft.draft_kind.reads_target_states else draft
