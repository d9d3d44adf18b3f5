"""P-EAGLE heads (arXiv 2602.01469): what in a file shows one, and the token of its masked positions. Imports no torch.

Such a head is read as an EAGLE-3 head (`models.eagle3`) of any number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.eagle3_writers import architectures, overrides
from pipeline.models.fields import Fields, is_int
from pipeline.models.weights import FC, MASK_HIDDEN

MASK_FIELD = "mask_token_id"
MASK_FIELDS = (MASK_FIELD, "ptd_token_id", "pard_token")
"""Fields with the token of masked positions: of speculators, of Amazon's heads, and what vLLM maps them to."""

UNKNOWN = -1
"""The token of a file that has not been opened with the recipe's readings (`eagle3.opened_config`)."""

MODEL_TYPES = ("peagle", "p-eagle", "p_eagle")


def is_p_eagle(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    """Return whether a config, or a head's tensors, are those of a P-EAGLE head."""
    return (
        config.get("speculators_model_type") in MODEL_TYPES
        or config.get("ptd_token_id") is not None
        or any("peagle" in name.lower() for name in architectures(config))
        or MASK_HIDDEN in tensors
    )


def mask_token(fields: Fields, tensors: Mapping[str, Any]) -> int:
    """Return the token of masked positions: the recipe's, or that of the file.

    A file without one may still get it from the recipe while its tensors are not known: `UNKNOWN`.

    Raises:
        SourceError: no such token, two different ones, one outside the vocabulary, or a file without `mask_hidden`.

    """
    told = overrides(fields.config).get(MASK_FIELD)
    listed = {name: value for name in MASK_FIELDS if (value := fields.config.get(name)) is not None}
    found = listed if told is None else {f"draft.{MASK_FIELD}": told}
    if not found and not tensors:
        return UNKNOWN
    if not found:
        fix = f"write the token of the training in the recipe: draft: {{{MASK_FIELD}: N}}"
        raise fields.error(MASK_FIELD, None, "a P-EAGLE head has a token of masked positions", fix)
    name, value = next(iter(found.items()))
    vocab = fields.size("vocab_size")
    if not is_int(value) or not 0 <= value < vocab:
        raise fields.error(name, value, f"expected a token, 0 to {vocab - 1}")
    if differing := [other for other in found if found[other] != value]:
        other = differing[0]
        fix = f"write the right one in the recipe: draft: {{{MASK_FIELD}: N}}"
        raise fields.error(other, found[other], f"{name}={value} differs", fix)
    for needed in (MASK_HIDDEN, FC):
        if tensors and needed not in tensors:
            raise fields.error("weights", needed, "a P-EAGLE head has this tensor", "use a complete head")
    return int(value)
