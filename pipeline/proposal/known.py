"""The table of public drafts: heads and small siblings, from `known_drafts.json`. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field, TypeAdapter

from pipeline.models.draft_kind import DraftMethod
from pipeline.records import Record

TABLE = Path(__file__).with_name("known_drafts.json")


class KnownDraft(Record):
    """A public draft of a public target. None of them was downloaded or measured."""

    target: str = Field(description="source of the target, without a revision")
    draft: str = Field(description="source of the draft, without a revision")
    method: DraftMethod = Field(description="draft_model, eagle3, p_eagle, dflash or dspark")
    draft_tokens: int = Field(description="K of the place where the pair was seen; 3 where it names none")
    license: str | None = Field(description="licence that the draft's card states; null: the card was not read")
    claim: str | None = Field(description="what the draft's card claims; null: not read, or no claim")
    seen: str = Field(description="public text, or recipe of this project, that names the pair")


@cache
def known_drafts() -> tuple[KnownDraft, ...]:
    """Return every entry of the table."""
    return TypeAdapter(tuple[KnownDraft, ...]).validate_json(TABLE.read_bytes())


def drafts_of(source: str) -> tuple[KnownDraft, ...]:
    """Return the known drafts of a target, the most promising first; its revision is ignored."""
    name = source.partition("@")[0].lower()
    return tuple(entry for entry in known_drafts() if entry.target.lower() == name)
