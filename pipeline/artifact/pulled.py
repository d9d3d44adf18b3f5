"""`pulled.json`: where an artifact on disk was pulled from, which part, its promotions, the verdict on its signature.

`pull` writes the record into the artifact's folder. It names the sha256 of the manifest that was pulled, so the record
of one artifact is none of another. A policy selects its rule by the recorded reference, on disk as at the pull. Who can
write to the folder can write the record too, as they can choose what to pull: signatures are checked at every start.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from pipeline.artifact.manifest import PULLED
from pipeline.errors import CorruptError
from pipeline.files.limits import AGAIN
from pipeline.records import Record

MAX_RECORD_BYTES = 64 << 10
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class Promoted(Record):
    """A copy that brought the release into its registry, as the record there lists it. The record is not signed."""

    source: Text
    destination: Text
    when: Text
    who: Text
    builder: Text
    run: Text = ""


class PullRecord(Record):
    """The record of a pull."""

    schema_version: Literal[1] = 1
    reference: str = Field(description="REGISTRY/NAME@VERSION-or-ALIAS as pulled; a folder as its absolute path")
    version: str = Field(description="version of the release")
    manifest_sha256: str = Field(description="SHA-256 of the manifest that was pulled")
    signer: str | None = Field(description="signer that the pull's policy accepted; null: no signature was required")
    only: tuple[str, ...] | None = Field(default=None, description="patterns of the pulled part; null: all files")
    promotions: tuple[Promoted, ...] = Field(default=(), description="copies of the release, the oldest first")

    def dump(self) -> bytes:
        """Return the record's bytes, without the oldest promotions beyond the limit; equal records give equal bytes."""
        data = self.model_dump_json(indent=1).encode() + b"\n"
        if len(data) <= MAX_RECORD_BYTES or not self.promotions:
            return data
        return self.model_copy(update={"promotions": self.promotions[1:]}).dump()


def pull_record(root: Path, manifest: bytes) -> PullRecord | None:
    """Return the record beside an artifact's manifest; None for an artifact that was not pulled.

    Raises:
        CorruptError: damaged, or the record of another manifest.

    """
    path = root / PULLED
    if not path.is_file() or path.is_symlink():
        return None
    fix = f"{AGAIN}; if the artifact was changed here on purpose, remove {PULLED}"
    with path.open("rb") as file:
        data = file.read(MAX_RECORD_BYTES)
    try:
        record = PullRecord.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError("damaged record of the pull", where=str(path), fix=fix) from error
    if record.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise CorruptError("the record is of another manifest", where=str(path), fix=fix)
    return record
