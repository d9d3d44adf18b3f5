"""The base class of data parsed from files: recipes, manifests, policies, reports."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable; an unknown key is an error; a field with an alias is accepted under either name."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
