"""Keys of `draft` that say how the file of a head is read, in place of what the file says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Tag

from pipeline.recipe.backend_settings import UnacceptedError

LISTED = "a list"
"""Name of a form of a key that has several: a tag of a union, not a key of the file."""

READINGS = (
    "taps", "norm_before_residual", "norm_output", "rope", "vocabulary", "mask_token_id", "sample_from_anchor",
)  # fmt: skip
UNREAD: Mapping[str, tuple[str, ...]] = {
    "eagle3": ("mask_token_id", "sample_from_anchor"),
    "p_eagle": ("norm_output", "sample_from_anchor"),
    "mtp": READINGS,
    "dflash": ("norm_before_residual", "norm_output"),
    "dspark": ("norm_before_residual", "norm_output"),
}
"""Method -> keys without effect on its drafts."""


def _taps(values: tuple[int, ...]) -> tuple[int, ...]:
    usable = sorted({value for value in values if value >= 0})
    if not values or list(values) != usable:
        raise UnacceptedError(
            f"found {list(values)}; accepted: ascending layers from 0", "write for example [2, 16, 29]"
        )
    return values


TAP_WORDS = "inputs, outputs or final"
TapLayers = Annotated[tuple[int, ...], AfterValidator(_taps)]
Taps = Annotated[
    Annotated[Literal["inputs", "outputs", "final"], Tag(TAP_WORDS)] | Annotated[TapLayers, Tag(LISTED)],
    Discriminator(lambda value: TAP_WORDS if isinstance(value, str) else LISTED),
]
