"""The limit of near-ties in answers."""

from __future__ import annotations

import pytest
import torch

from pipeline.validate.gates.choices import Choice, check_choices
from pipeline.validate.reference.golden import Golden, Summary

TOKENS, NEAR = 30, 1e-4


def golden(ties: int) -> Golden:
    """Token 0 is the baseline's choice everywhere; token 1 lies just below it at the first `ties` positions."""
    gaps_T = torch.tensor([NEAR if at < ties else 0.5 for at in range(TOKENS)])
    values_TN = torch.stack((torch.ones(TOKENS), 1 - gaps_T), dim=1)
    summary = Summary(values_TN, torch.zeros(TOKENS, 1), torch.zeros(TOKENS), torch.zeros(TOKENS, dtype=torch.int32))
    ids_TN = torch.tensor([[0, 1]] * TOKENS, dtype=torch.int32)
    caches = torch.zeros(TOKENS, 1, 2, 1)
    return Golden(ids_TN, summary, summary, caches, caches)


@pytest.mark.parametrize(("ties", "passes"), [(0, True), (3, True), (4, False)])
def test_check_choices_counts_whole_near_ties(ties, passes):
    """Of 30 tokens, 2% and two standard deviations are 2.6."""
    choices = [Choice("decode", "a", at, int(at < ties)) for at in range(TOKENS)]
    checked = check_choices(choices, {"a": [golden(ties)]}, floor=1e-3, near_tie_rate=0.02)
    assert (checked.findings == ()) is passes
    assert checked.counts.near_ties == ties
