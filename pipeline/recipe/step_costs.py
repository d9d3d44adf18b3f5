"""Costs of speculative steps, in decode steps, for each K: one list, or others by batch bucket and cached tokens.

A step verifies K+1 tokens of each row, so its cost grows with the rows and with the keys that attention reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from pipeline.recipe.backend_settings import UnacceptedError
from pipeline.recipe.readings import LISTED

BY_BATCH, BY_TOKENS = "by batch", "by cached tokens"
"""Names of the other forms, as `LISTED`."""


def _count(key: Any) -> Any:
    if not isinstance(key, str):
        return key
    if not re.fullmatch("[1-9][0-9]*", key):
        what = f"found {key!r}; accepted: an integer from 1, for example 4"
        raise UnacceptedError(what, "write a batch bucket, and in it numbers of cached tokens")
    return int(key)


def _form(mapped: str) -> Discriminator:
    return Discriminator(lambda value: mapped if isinstance(value, dict) else LISTED)


Count = Annotated[int, BeforeValidator(_count)]
Costs = tuple[Annotated[float, Field(allow_inf_nan=False, gt=0)], ...]
BatchCosts = Annotated[
    Annotated[Costs, Tag(LISTED)] | Annotated[dict[Count, Costs], Field(min_length=1), Tag(BY_TOKENS)],
    _form(BY_TOKENS),
]
"""Costs of a batch bucket: a list, or one for caches of up to so many tokens."""
StepCosts = Annotated[
    Annotated[Costs, Tag(LISTED)] | Annotated[dict[Count, BatchCosts], Field(min_length=1), Tag(BY_BATCH)],
    _form(BY_BATCH),
]


def fault_of(costs: StepCosts, draft_tokens: Sequence[int], batches: Sequence[int], length: int) -> str | None:
    """Return what makes costs unusable for these K, batch buckets and the longest cache; None: nothing."""
    if any(len(listed) != len(draft_tokens) for listed in lists(costs)):
        return f"expected one cost for each of {list(draft_tokens)}"
    found = by_shape(costs, batches, length)
    if set(found) != set(batches) or any(max(by_tokens) < length for by_tokens in found.values()):
        return f"expected costs for the batches {list(batches)}, of caches of up to {length} tokens"
    return None


def by_shape(costs: StepCosts, batches: Sequence[int], length: int) -> dict[int, dict[int, Costs]]:
    """Return the costs by batch bucket, then by the cached tokens up to which they hold, at most `length`."""
    of_batches: dict[int, BatchCosts] = costs if isinstance(costs, dict) else dict.fromkeys(batches, costs)
    return {batch: of if isinstance(of, dict) else {length: of} for batch, of in of_batches.items()}


def lists(costs: StepCosts) -> Iterator[Costs]:
    """Return every list of costs."""
    for of_batch in costs.values() if isinstance(costs, dict) else [costs]:
        yield from of_batch.values() if isinstance(of_batch, dict) else [of_batch]


def least(costs: StepCosts) -> Costs:
    """Return the costs in the smallest batch bucket with the shortest caches."""
    of_batch = costs[min(costs)] if isinstance(costs, dict) else costs
    return of_batch[min(of_batch)] if isinstance(of_batch, dict) else of_batch
