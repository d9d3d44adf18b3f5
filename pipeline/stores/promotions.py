"""The record of how a release came into a registry, beside the release: an in-toto statement, which is not signed.

A copy from registry to registry adds a promotion to those that the record in its source lists. A release that was
published into a registry has no record there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from pipeline.errors import CorruptError
from pipeline.files.limits import SIGNATURE_BYTES
from pipeline.records import Record

PROMOTED = "promoted.json"
"""Path of the record in a release."""
MAX_PROMOTIONS, MAX_TEXT = 100, 4096
"""Promotions of a record, and characters of each of their values."""

Text = Annotated[str, Field(max_length=MAX_TEXT, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


@dataclass(frozen=True)
class Promotion:
    """One copy of a release from registry to registry, or to or from a file; who made it, and in which workflow's run.

    `when` is from the clock of the host that copied: shown, never compared.
    """

    source: Text
    destination: Text
    when: Text
    who: Text
    builder: Text
    run: Text = ""


class _Subject(Record):
    name: Text
    digest: dict[Literal["sha256"], str]


class _Predicate(Record):
    promotions: Annotated[tuple[Promotion, ...], Field(min_length=1, max_length=MAX_PROMOTIONS)]


class _Statement(Record):
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: Annotated[tuple[_Subject, ...], Field(min_length=1, max_length=1)]
    predicate_type: Literal["urn:tandem:promotion:v1"] = Field(default="urn:tandem:promotion:v1", alias="predicateType")
    predicate: _Predicate


def promotion_text(release: str, manifest_sha256: str, promotions: Sequence[Promotion]) -> bytes:
    """Return the record of a release (`name@version`): its promotions, the oldest first.

    The oldest promotions are left out of a record that would exceed the limits.
    """
    subject = _Subject(name=release, digest={"sha256": manifest_sha256})
    kept = tuple(promotions)[-MAX_PROMOTIONS:]
    while True:
        statement = _Statement(subject=(subject,), predicate=_Predicate(promotions=kept))
        text = statement.model_dump_json(by_alias=True, indent=1).encode() + b"\n"
        if len(text) <= SIGNATURE_BYTES or len(kept) == 1:
            return text
        kept = kept[1:]


def promotions_of(data: bytes, manifest_sha256: str, where: str) -> tuple[Promotion, ...]:
    """Parse a record; return its promotions, the oldest first.

    Raises:
        CorruptError: damaged, or the record of another manifest.

    """
    try:
        statement = _Statement.model_validate_json(data)
    except ValidationError as error:
        what, fix = f"damaged record of a promotion ({PROMOTED})", "remove the record from the registry"
        raise CorruptError(what, where=where, fix=fix) from error
    if statement.subject[0].digest.get("sha256") != manifest_sha256:
        what = f"the record of a promotion ({PROMOTED}) is of another manifest"
        raise CorruptError(what, where=where, fix="remove the record from the registry")
    return statement.predicate.promotions
