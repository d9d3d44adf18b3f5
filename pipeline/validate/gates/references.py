"""Goldens of all scored sequences, for both models, and the effect of rounded weights on them. Runs no compiled graph.

Parity compares the artifact with its rounded weights in transformers. Rounding measures how far these are from the
model: the reference with rounded weights against the reference with the dtype's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.progress import Log
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.gates.answers import Sequences
from pipeline.validate.gates.inputs import MODELS
from pipeline.validate.reference.golden import Golden
from pipeline.validate.reference.goldens import Goldens, GoldenStore
from pipeline.validate.reference.layers import Taps
from pipeline.validate.report.schema import Cached, Rounding


@dataclass(frozen=True)
class ModelReference:
    """One model's goldens by sequence name, how many were cached, and what rounded weights changed, if it has any."""

    goldens: dict[str, Golden]
    counts: Cached
    rounding: Rounding | None


class ReferenceInputs(Protocol):
    """What references follow from: a part of `GateInputs`, without an open artifact."""

    @property
    def recipe(self) -> Recipe:
        """The recipe, which says how weights are stored."""
        ...

    @property
    def checkpoints(self) -> tuple[Checkpoint, Checkpoint]:
        """Target and draft."""
        ...

    @property
    def cache(self) -> GoldenStore:
        """Where goldens are kept."""
        ...

    @property
    def log(self) -> Log:
        """Called with a line for each run."""
        ...


def compute_references(inputs: ReferenceInputs, sequences: Sequences) -> dict[str, ModelReference]:
    """Return the reference of target and draft, computed or from the cache."""
    return {model: _reference(source, sequences) for model, source in _sources(inputs).items()}


def compute_goldens(inputs: ReferenceInputs, sequences: Sequences) -> dict[str, Cached]:
    """Fill the cache with all goldens that the references of some sequences need; return the counts by model."""
    return {model: _goldens(source, sequences)[2] for model, source in _sources(inputs).items()}


def goldens_of(inputs: ReferenceInputs, model: str, sequences: Sequences) -> dict[str, Golden]:
    """Return one model's goldens by sequence name, computed or from the cache."""
    return _by_name(_sources(inputs)[model], sequences)


def goldens_along(
    inputs: ReferenceInputs, model: str, sequences: Sequence[list[int]], experts: Sequence[Tensor]
) -> list[Golden]:
    """Return goldens of one model that follow given experts, int [T, L, C] of each sequence."""
    return _sources(inputs)[model].of(sequences, experts)


def _sources(inputs: ReferenceInputs) -> dict[str, Goldens]:
    recipe, (target, draft) = inputs.recipe, inputs.checkpoints
    taps = Taps.of(target.config, draft.config)
    narrow = {"target": recipe.target.weights, "draft": recipe.draft_weights}
    dtype = {"target": recipe.target.dtype, "draft": recipe.draft.dtype or recipe.target.dtype}
    return {
        model: Goldens(of, target, dtype[model], inputs.cache, inputs.log, narrow[model], narrow["target"], taps)
        for model, of in zip(MODELS, (target, draft), strict=True)
    }


def _by_name(source: Goldens, sequences: Sequences) -> dict[str, Golden]:
    goldens = source.of([sequence.reference for sequence in sequences.all])
    return {sequence.name: golden for sequence, golden in zip(sequences.all, goldens, strict=True)}


def _goldens(source: Goldens, sequences: Sequences) -> tuple[dict[str, Golden], list[Golden], Cached]:
    """Return the goldens by name, those of prompts with the dtype's own weights if stored narrower, and the counts."""
    by_name = _by_name(source, sequences)
    counts = Cached(computed=source.computed, cached=source.cached)
    if source.narrow is None:
        return by_name, [], counts
    plain = replace(source, narrow=None, target_narrow=None, _known={})
    return by_name, plain.of([sequence.reference for sequence in sequences.prompts]), counts


def _reference(source: Goldens, sequences: Sequences) -> ModelReference:
    by_name, whole, counts = _goldens(source, sequences)
    rounded = [by_name[sequence.name] for sequence in sequences.prompts]
    return ModelReference(by_name, counts, rounding(rounded, whole) if whole else None)


def rounding(rounded: Sequence[Golden], whole: Sequence[Golden]) -> Rounding:
    """Return what rounding changed, over all tokens of the same sequences."""
    pairs = list(zip(rounded, whole, strict=True))
    same = torch.cat([r.baseline.best == w.baseline.best for r, w in pairs])
    same_of_noise = torch.cat([w.noise.best == w.baseline.best for w in whole])
    errors = torch.cat([(r.baseline.projected - w.baseline.projected).pow(2).sum(-1) for r, w in pairs])
    noises = torch.cat([(w.noise.projected - w.baseline.projected).pow(2).sum(-1) for w in whole])
    return Rounding(
        tokens=len(same),
        same_choice=float(same.double().mean()),
        same_choice_of_noise=float(same_of_noise.double().mean()),
        logit_error=float(errors.mean().sqrt()),
        logit_noise=float(noises.mean().sqrt()),
    )
