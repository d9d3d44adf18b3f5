"""Goldens of all scored sequences, for both models, and the effect of int8 weights on them. Runs no compiled graph.

Parity compares the artifact with its int8 weights in transformers. Rounding measures how far these are from the
model: the reference with rounded weights against the reference with the dtype's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.models.eagle3 import taps_of
from pipeline.validate.gates.answers import Sequences
from pipeline.validate.gates.inputs import MODELS, GateInputs
from pipeline.validate.reference.golden import Golden
from pipeline.validate.reference.goldens import Goldens
from pipeline.validate.reference.layers import Taps
from pipeline.validate.report.schema import Cached, Rounding


@dataclass(frozen=True)
class ModelReference:
    """One model's goldens by sequence name, how many were cached, and what int8 weights changed, if it has any."""

    goldens: dict[str, Golden]
    counts: Cached
    rounding: Rounding | None


def compute_references(inputs: GateInputs, sequences: Sequences) -> dict[str, ModelReference]:
    """Return the reference of target and draft, computed or from the cache."""
    target, draft = inputs.checkpoints
    taps = Taps(taps_of(target.config, draft.config))  # of a draft model: none
    return {model: _reference(inputs, model, sequences, taps) for model in MODELS}


def _reference(inputs: GateInputs, model: str, sequences: Sequences, taps: Taps) -> ModelReference:
    recipe, target = inputs.recipe, inputs.checkpoints[0]
    narrow = recipe.draft_weights if model == "draft" else recipe.target.weights
    checkpoint = inputs.checkpoints[MODELS.index(model)]
    source = Goldens(
        checkpoint, target, inputs.dtype_of(model), inputs.cache, inputs.log, narrow, recipe.target.weights, taps
    )
    goldens = source.of([sequence.tokens for sequence in sequences.all])
    by_name = {sequence.name: golden for sequence, golden in zip(sequences.all, goldens, strict=True)}
    counts = Cached(computed=source.computed, cached=source.cached)
    if narrow is None:
        return ModelReference(by_name, counts, None)
    plain = replace(source, narrow=None, target_narrow=None, _known={})
    whole = plain.of([sequence.tokens for sequence in sequences.prompts])
    return ModelReference(by_name, counts, rounding(goldens[: len(whole)], whole))


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
