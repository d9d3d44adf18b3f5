"""Near-ties of routers: choices of experts that are not the baseline's, which rounding must explain. Part of gate 1.

Along the same experts before, the gap of the baseline's scores at such a choice is at most a few times the noise of its
scores. Near-ties are counted, and bounded by those of transformers in the recipe's dtype.

Shapes: N tokens of all runs, T tokens of a sequence, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.validate.gates.expert_errors import ComparedExperts
from pipeline.validate.gates.experts import ChosenExperts
from pipeline.validate.limits import ROUTER_TIE, most_near_ties
from pipeline.validate.reference.golden import Golden
from pipeline.validate.report.schema import ExpertChoices

CHANGED = "a graph chose other experts when it ran the same tokens again"


@dataclass(frozen=True)
class RouterErrors:
    """All choices of experts of one model. float32 or bool [N, L]: `over_noise` is the gap over the noise."""

    over_noise: Tensor
    flips_of_noise: Tensor

    @classmethod
    def of(cls, chosen: Iterable[ChosenExperts | None]) -> RouterErrors | None:
        """Return those of all runs that have experts; None without."""
        routes = [of.routes for of in chosen if of is not None]
        if not routes:
            return None
        gaps, noise, flips = (
            torch.cat([getattr(of, name) for of in routes]) for name in ("gaps", "noise", "flips_of_noise")
        )
        over_noise = gaps / torch.maximum(noise, noise.median(dim=0).values).clamp(min=1e-30)
        return cls(over_noise, flips)

    def section(self, compared: ComparedExperts) -> ExpertChoices:
        """Return the section of the report, with errors by expert."""
        differ = self.over_noise > 0
        return ExpertChoices(
            choices=self.over_noise.numel(),
            near_ties=int(differ.sum()),
            near_ties_of_noise=int(self.flips_of_noise.sum()),
            tokens=int(differ.any(-1).sum()),
            largest_gap_over_noise=float(self.over_noise.clamp(min=0).max()),
            layers=tuple(differ.sum(0).tolist()),
            compared=compared.count,
            worst=compared.worst,
        )


def router_findings(
    chosen: Sequence[ChosenExperts | None],
    errors: RouterErrors | None,
    near_tie_rate: float,
    place: Callable[[int], str],
) -> Iterator[str]:
    """Yield what is wrong with choices of experts; `place` returns the name of a token."""
    faults = [of.fault for of in chosen if of is not None and of.fault]
    faults += [CHANGED for of in chosen if of is not None and not of.fault and not of.is_followed]
    if faults:
        yield f"router: {faults[0]}"
    if faults or errors is None:
        return
    far = (errors.over_noise > ROUTER_TIE).nonzero()
    if len(far):
        token, layer = far[0].tolist()
        gap = f"gap {float(errors.over_noise[token, layer]):.1f} times the noise; the limit is {ROUTER_TIE:g}"
        first = f"first at {place(token)}, router {layer}, {gap}"
        yield f"router: {len(far)} choices of experts are not near-ties, {first}"
    ties, usual = int((errors.over_noise > 0).sum()), int(errors.flips_of_noise.sum())
    if ties > most_near_ties(errors.over_noise.numel(), usual, near_tie_rate):
        yield f"router: {ties} near-ties in {errors.over_noise.numel()} choices of experts; transformers has {usual}"


def first_ties(goldens: Mapping[str, Golden]) -> dict[str, int]:
    """Return the first position of each sequence at which rounding can change the choice of experts."""
    routes = {name: golden.routes for name, golden in goldens.items() if golden.routes is not None}
    if not routes:
        return {}
    floor_L = torch.cat([of.noise for of in routes.values()]).median(dim=0).values
    found = {}
    for name, of in routes.items():
        tied_T = (of.gaps.abs() <= ROUTER_TIE * torch.maximum(of.noise, floor_L)).any(-1)
        found[name] = int(tied_T.int().argmax()) if bool(tied_T.any()) else len(tied_T)
    return found
