"""Gate 1: are the compiled models numerically the models? Teacher-forced logits of the shipped `score` graphs.

Three-way: transformers in float32 is the baseline, transformers in the recipe's dtype shows the noise to expect (for a
float32 recipe: float32 with the other attention implementation), the artifact is judged.

Tolerances are those of the Neuron plugin's logit validation: the error of the top k logits over the largest baseline
logit stays under a bound for each k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.plan import GraphSpec
from pipeline.runtime.engine import Engine

ATOL = 1e-5
RTOL = {5: 0.011, 50: 0.02, 1000: 0.03, 0: 0.05}
"""Relative tolerance by k; 0 means the whole vocabulary."""


@dataclass
class Parity:
    """Figures of one model over all prompts."""

    model: str
    tokens: int = 0
    flips: int = 0
    near_ties: int = 0
    worst: dict[int, float] = field(default_factory=lambda: dict.fromkeys(RTOL, 0.0))
    worst_absolute: float = 0.0
    squared_error: float = 0.0
    squared_noise: float = 0.0
    first_divergence: dict[str, Any] | None = None
    finite: bool = True

    def add(self, prompt: str, got_TV: Tensor, baseline_TV: Tensor, noisy_TV: Tensor) -> None:
        """Compare one sequence: artifact against baseline, with the noise beside it."""
        self.finite = self.finite and bool(torch.isfinite(got_TV).all())
        error_TV, noise_TV = (got_TV - baseline_TV).abs(), (noisy_TV - baseline_TV).abs()
        self.tokens += got_TV.shape[0]
        self.squared_error += float(error_TV.pow(2).mean(-1).sum())
        self.squared_noise += float(noise_TV.pow(2).mean(-1).sum())
        self.worst_absolute = max(self.worst_absolute, float(error_TV.max()))
        scale_T1 = baseline_TV.abs().amax(-1, keepdim=True)
        excess_TV = (error_TV - ATOL).clamp(min=0) / scale_T1
        order_TN = baseline_TV.topk(min(1000, baseline_TV.shape[-1]), dim=-1).indices
        for k in RTOL:
            chosen = excess_TV.gather(-1, order_TN[:, :k]) if k else excess_TV
            self.worst[k] = max(self.worst[k], float(chosen.max()))
        self._count_flips(prompt, got_TV, baseline_TV, error_TV)

    def _count_flips(self, prompt: str, got_TV: Tensor, baseline_TV: Tensor, error_TV: Tensor) -> None:
        """A flipped argmax is a near-tie when the baseline's top-1/top-2 gap is within twice the error bound."""
        top_T2 = baseline_TV.topk(2, dim=-1)
        flipped = got_TV.argmax(-1) != top_T2.indices[:, 0]
        for place in flipped.nonzero()[:, 0].tolist():
            gap = float(top_T2.values[place, 0] - top_T2.values[place, 1])
            bound = ATOL + RTOL[5] * float(baseline_TV[place].abs().max())
            self.flips += 1
            self.near_ties += gap <= min(2 * float(error_TV[place].max()), bound)
            if self.first_divergence is None:
                self.first_divergence = {"prompt": prompt, "position": place, "top1_top2_gap": gap}

    @property
    def error_ratio(self) -> float:
        """Error of the artifact over the dtype's own noise, root mean square."""
        return float((self.squared_error / max(self.squared_noise, 1e-30)) ** 0.5)

    def failures(self, near_tie_rate: float) -> list[str]:
        """Why this gate fails; empty when it passes."""
        found = [] if self.finite else ["logits are not finite"]
        for k, worst in self.worst.items():
            if not worst <= RTOL[k]:
                found.append(f"top-{k or 'all'} error {worst:.2e} exceeds {RTOL[k]}")
        if self.flips > self.near_ties:
            found.append(f"{self.flips - self.near_ties} tokens flip beyond near-ties, first {self.first_divergence}")
        if self.near_ties > near_tie_rate * self.tokens:
            found.append(f"near-tie flips {self.near_ties} of {self.tokens} exceed the rate {near_tie_rate}")
        return [f"{self.model}: {what}" for what in found]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tokens": self.tokens,
            "flips": self.flips,
            "near_ties": self.near_ties,
            "worst_relative": {str(k or "all"): worst for k, worst in self.worst.items()},
            "tolerances": {str(k or "all"): bound for k, bound in RTOL.items()},
            "worst_absolute": self.worst_absolute,
            "error_over_dtype_noise": self.error_ratio,
            "first_divergence": self.first_divergence,
        }


def score(engine: Engine, spec: GraphSpec, sequences: list[list[int]]) -> list[Tensor]:
    """Logits float32 [T, V] of up to B sequences through a `score` graph, in chunks of its T."""
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), spec.tokens):
        tokens = torch.zeros(spec.batch, spec.tokens, dtype=torch.int32)
        position = torch.full((spec.batch,), engine.length, dtype=torch.int32)
        sizes = [len(sequence[start : start + spec.tokens]) for sequence in sequences]
        for row, (sequence, size) in enumerate(zip(sequences, sizes, strict=True)):
            if size:
                tokens[row, :size] = torch.tensor(sequence[start : start + size], dtype=torch.int32)
                position[row] = start
        out = engine.ranks.run(spec, {"tokens": tokens, "position": position})["logits"]
        for row, size in enumerate(sizes):
            parts[row].append(out[row, :size].clone())
    return [torch.cat(pieces) for pieces in parts]
