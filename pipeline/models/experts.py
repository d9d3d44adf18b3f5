"""The fields of `config.json` that describe experts. Imports no torch."""

from __future__ import annotations

from typing import Any

from pipeline.models.config import Experts
from pipeline.models.fields import Fields


def read_experts(fields: Fields, size: str, count: str, *, among: bool) -> Experts:
    """Return the experts of a config; `size` and `count` name the fields of their inner size and their number.

    Raises:
        SourceError: more chosen experts than there are, or an activation that experts do not have here.

    """
    experts = counted(fields, size, count, among=among)
    if fields.value("hidden_act") not in ("silu", "swish"):
        raise fields.error("hidden_act", fields.value("hidden_act"), "experts with it are not supported", "use silu")
    return experts


def counted(
    fields: Fields, size: str, count: str, *, among: bool, chosen: str = "num_experts_per_tok", **others: Any
) -> Experts:  # fmt: skip
    """Return the experts of a config, whatever its activation; `others` are fields of `Experts`.

    `chosen` names the field of the number of experts of a token.

    Raises:
        SourceError: more chosen experts than there are.

    """
    experts = Experts(fields.size(count), fields.size(chosen), fields.size(size), among, **others)
    if experts.chosen > experts.count:
        raise fields.error(chosen, experts.chosen, f"expected at most {count}={experts.count}")
    return experts
