"""The base of everything that is parsed from a file: recipes, manifests, policies, reports. Knows none of them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable; an unknown key is an error; a field with an alias can be given by either name."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
