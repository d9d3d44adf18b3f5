"""The text of a yank: JSON, in a small object or file beside the releases."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import CorruptError
from pipeline.stores.base import Yank

YANK_BYTES = 64 << 10
YANKS: TypeAdapter[Yank] = TypeAdapter(Yank)


def yank_text(yank: Yank) -> bytes:
    """Return the text of a yank."""
    return json.dumps(asdict(yank), indent=1).encode() + b"\n"


def yank_of(data: bytes, where: str) -> Yank:
    """Parse the text of a yank.

    Raises:
        CorruptError: damaged; the release then counts as unusable.

    """
    try:
        return YANKS.validate_json(data)
    except ValidationError as error:
        what, fix = "damaged record of a yank", "use another version"
        raise CorruptError(what, where=where, fix=fix) from error
