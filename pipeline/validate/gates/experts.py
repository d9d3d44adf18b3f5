"""The experts that an artifact's `score` graphs chose, and references that follow them. Part of gate 1.

Where these are not the baseline's own, what is left of error and noise is rounding. Judges only their form; whether
each of them may be followed: `router_ties.py`.

Shapes: T tokens of a sequence, L layers with experts, C experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.references import goldens_along
from pipeline.validate.reference.golden import Golden
from pipeline.validate.reference.routes import Routes


@dataclass(frozen=True)
class ChosenExperts:
    """Experts that a graph chose for a sequence, int16 [T, L, C], ascending; `fault` says what is wrong with them.

    `routes` are those of the reference that it was compared with last.
    """

    experts: Tensor
    routes: Routes
    fault: str = ""

    @property
    def is_followed(self) -> bool:
        """Whether the reference has the same experts."""
        return torch.equal(self.experts, self.routes.experts)


def chosen_experts(pieces: Sequence[Tensor], golden: Golden, config: ModelConfig) -> ChosenExperts | None:
    """Return the experts in the outputs of consecutive chunks; None without experts."""
    if not pieces or golden.routes is None:
        return None
    experts_TLC = torch.cat(list(pieces)).sort(dim=-1).values.to(torch.int16)
    return ChosenExperts(experts_TLC, golden.routes, _fault(experts_TLC, config))


def _fault(experts_TLC: Tensor, config: ModelConfig) -> str:
    of_layers = config.expert_layers
    layers, chosen = experts_TLC.shape[1:]
    if (layers, chosen) != (len(of_layers), of_layers[0].chosen):
        return f"{chosen} experts of a token in {layers} layers; expected {of_layers[0].chosen} in {len(of_layers)}"
    if int(experts_TLC.min()) < 0 or int(experts_TLC.max()) >= of_layers[0].count:
        return f"experts {int(experts_TLC.min())} to {int(experts_TLC.max())}; there are {of_layers[0].count}"
    if chosen > 1 and int(experts_TLC.diff(dim=-1).min()) < 1:
        return "a token has the same expert twice"
    return ""


def along(
    inputs: GateInputs, model: str, chosen: Mapping[str, tuple[Sequence[int], ChosenExperts | None]]
) -> dict[str, Golden]:
    """Return goldens that follow the experts of sequences, by name, of those with other experts than the baseline's.

    `chosen` has the tokens of each sequence that are compared, and its experts.
    """
    others = {
        name: (list(tokens[: len(of.experts)]), of.experts)
        for name, (tokens, of) in chosen.items()
        if of is not None and not of.fault and not of.is_followed
    }
    if not others:
        return {}
    goldens = goldens_along(inputs, model, *map(list, zip(*others.values(), strict=True)))
    return dict(zip(others, goldens, strict=True))
