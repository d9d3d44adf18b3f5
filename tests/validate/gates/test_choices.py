"""The limit of near-ties in answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.validate.gates.choices import Choice, check_choices
from pipeline.validate.reference.golden import Golden, Summary
from pipeline.validate.reference.routes import Routes

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


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_check_choices_bounds_tokens_after_near_ties_of_a_router(wrong, passes):
    """Of 30 tokens, 2% round up to one; token 1 is far from the baseline's."""
    choices = [Choice("decode", "a", at, int(at >= TOKENS - wrong)) for at in range(TOKENS)]
    checked = check_choices(choices, {"a": [routed_golden(tie=5)]}, floor=1e-3, near_tie_rate=0.02)
    assert (checked.findings == ()) is passes
    assert checked.counts.after_router_ties == wrong


def test_check_choices_allows_no_wrong_token_before_near_ties_of_a_router():
    choices = [Choice("decode", "a", at, int(at == 4)) for at in range(TOKENS)]
    checked = check_choices(choices, {"a": [routed_golden(tie=5)]}, floor=1e-3, near_tie_rate=0.02)
    assert checked.findings == ("decode: token 1 at position 5 is not the baseline's, gap 5.0e-01",)


def test_check_choices_takes_the_golden_that_fits_best():
    """Along the experts of the artifact, token 1 is nearly the best; along the baseline's it is not."""
    choices = [Choice("decode", "a", 0, 1)]
    checked = check_choices(choices, {"a": [golden(0), golden(1)]}, floor=1e-3, near_tie_rate=0.02)
    assert checked.findings == ()
    assert checked.counts.near_ties == 1


def routed_golden(tie: int) -> Golden:
    """As `golden`, with experts whose router is at a near-tie at one position."""
    gaps_TL = torch.full((TOKENS, 1), -1.0)
    gaps_TL[tie] = -0.01
    experts_TLC = torch.zeros(TOKENS, 1, 1, dtype=torch.int16)
    routes = Routes(experts_TLC, gaps_TL, torch.full((TOKENS, 1), 0.01), torch.zeros(TOKENS, 1, dtype=torch.bool))
    return replace(golden(0), routes=routes)
