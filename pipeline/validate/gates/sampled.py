"""A sampled token, and its place in the distribution that it must come from.

Shapes: V vocabulary of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.graphs.arguments import Draw
from pipeline.validate.gates.exact_tests import Drawn
from pipeline.validate.gates.judge import SETTINGS, Judge, words


@dataclass(frozen=True)
class Sample:
    """A sampled token, its index in its step, the index of its settings, its seed and its position."""

    token: int
    index: int
    setting: int
    seed: int
    position: int


def add_sample(drawn: Drawn, sample: Sample, judge: Judge, logits_V: Tensor, generator: torch.Generator) -> None:
    """Add a sampled token, with the target's logits before it."""
    choice, token = SETTINGS[sample.setting], sample.token
    drawn.tokens += 1
    if judge.candidates is not None and sample.setting == 0:
        drawn.left_out.append(judge.left_out(logits_V))
    probs_V = judge.probabilities(logits_V, choice)
    if probs_V[token] == 0:
        drawn.borders += 1
        if not judge.nearly_in(logits_V, choice, token):
            drawn.faults.append(f"sampled token {token}, which has probability 0 at {words(choice)}")
        return
    if not judge.selects(logits_V, Draw(choice, sample.seed), sample.position, token):
        drawn.faults.append(f"sampled token {token}, which its seed does not select, at {words(choice)}")
    if probs_V[token] == 1:  # no alternative
        return
    tied = float(probs_V[logits_V == logits_V[token]].sum())
    above = float(probs_V[logits_V > logits_V[token]].sum())
    drawn.index.append(sample.index)
    drawn.settings.append(sample.setting)
    drawn.ranks.append(above + tied * float(torch.rand((), generator=generator)))
