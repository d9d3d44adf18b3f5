"""The fields of `config.json` that describe experts. Imports no torch."""

from __future__ import annotations

from pipeline.models.config import Experts
from pipeline.models.fields import Fields


def read_experts(fields: Fields, size: str, count: str, *, among: bool) -> Experts:
    """Return the experts of a config; `size` and `count` name the fields of their inner size and their number.

    Raises:
        SourceError: more chosen experts than there are, or an activation that experts do not have here.

    """
    experts = Experts(fields.size(count), fields.size("num_experts_per_tok"), fields.size(size), among)
    if experts.chosen > experts.count:
        raise fields.error("num_experts_per_tok", experts.chosen, f"expected at most {count}={experts.count}")
    if fields.value("hidden_act") not in ("silu", "swish"):
        raise fields.error("hidden_act", fields.value("hidden_act"), "experts with it are not supported", "use silu")
    return experts
