"""What a DSpark draft adds to a DFlash draft, by its config: a Markov head, a layout of its block. Imports no torch.

A confidence head, which estimates acceptance rates, changes no output: a file may have one, and it is not read. Fields
stand in `dflash_config` (SpecForge, ModelOpt) or at the top level (DeepSeek, speculators).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pipeline.errors import SourceError
from pipeline.models.config import Markov, MarkovKind
from pipeline.models.eagle3_writers import Writer, architectures, overrides, size_of
from pipeline.models.fields import Fields, is_int
from pipeline.models.weights import MARKOV_W1

DSPARK_TYPE = "dspark"
"""`speculators_model_type`, and SpecForge's and ModelOpt's `projector_type`."""

DSPARK_NAMES = ("dsparkdraftmodel", "qwen3dsparkmodel", "dsparkspeculator", "qwen3dsparkforcausallm")
"""Architectures, in lower case, of drafts with Qwen3's layers; those of other families have other layers."""

CONFIDENCE = "confidence_head.proj."
"""Start of the names of the confidence head's tensors."""

ANCHOR_FIELD, SHIFT_FIELD = "sample_from_anchor", "shift_label"
"""Whether a position of a block predicts the token after it: the second is ModelOpt's name."""

SPECULATORS_RANK = 256


def is_dspark(config: Mapping[str, Any]) -> bool:
    """Return whether a config is a DSpark draft's."""
    options = config.get("dflash_config")
    return (
        config.get("speculators_model_type") == DSPARK_TYPE
        or (isinstance(options, Mapping) and options.get("projector_type") == DSPARK_TYPE)
        or any(name.lower() in DSPARK_NAMES for name in architectures(config))
    )


def from_anchor(fields: Fields, options: Mapping[str, Any], writer: Writer) -> bool:
    """Return whether the newest token's position predicts the first draft token; the recipe's reading comes first.

    Raises:
        SourceError: a value that is not true or false, or none in a DSpark draft of speculators.

    """
    told = overrides(fields.config).get(ANCHOR_FIELD)
    if told is not None:
        return bool(told)
    if not is_dspark(fields.config):
        return _stated(fields, options, (ANCHOR_FIELD,)) or False
    stated = _stated(fields, options, (ANCHOR_FIELD, SHIFT_FIELD))
    if stated is None and writer == "speculators":
        fix = f"write the layout of the training in the recipe: draft: {{{ANCHOR_FIELD}: true}}"
        raise fields.error(ANCHOR_FIELD, None, "readers differ on a file of speculators that leaves it out", fix)
    return True if stated is None else stated


def _stated(fields: Fields, options: Mapping[str, Any], names: Sequence[str]) -> bool | None:
    found: dict[str, bool] = {}
    for place, values in (("", fields.config), ("dflash_config.", options)):
        for name in names:
            value = values.get(name)
            if value is not None and not isinstance(value, bool):
                raise fields.error(f"{place}{name}", value, "expected true or false")
            found |= {} if value is None else {f"{place}{name}": value}
    if len(set(found.values())) > 1:
        first, second = list(found)[:2]
        raise fields.error(second, found[second], f"{first}={str(found[first]).lower()} differs")
    return next(iter(found.values()), None)


def markov_of(fields: Fields, options: Mapping[str, Any], tensors: Mapping[str, Any]) -> Markov | None:
    """Return the Markov head of a DSpark draft; None for one without (`markov_rank` 0).

    Raises:
        SourceError: a rank or a kind that does not exist, or a field that differs between its two places.

    """
    absent = SPECULATORS_RANK if "speculators_model_type" in fields.config else 0
    if MARKOV_W1 in tensors:
        absent = size_of(fields, tensors, MARKOV_W1, 1)
    rank = _field(fields, options, "markov_rank", absent)
    if not is_int(rank) or rank < 0:
        raise fields.error("markov_rank", rank, "expected an integer from 0")
    kind, kinds = _field(fields, options, "markov_head_type", "vanilla"), get_args(MarkovKind)
    if kind not in kinds:
        raise fields.error("markov_head_type", kind, f"supported: {', '.join(kinds)}")
    return Markov(kind, rank) if rank else None


def _field(fields: Fields, options: Mapping[str, Any], name: str, absent: Any) -> Any:
    nested, outer = options.get(name), fields.config.get(name)
    if nested is not None and outer is not None and nested != outer:
        raise _differing(fields, name, nested, outer)
    return absent if nested is None and outer is None else outer if nested is None else nested


def _differing(fields: Fields, name: str, nested: Any, outer: Any) -> SourceError:
    return fields.error(name, outer, f"dflash_config.{name}={nested} differs", "remove the wrong one of the two")
