"""Limits for documents that strangers wrote: bytes, number of values, nesting. Checked before a document is parsed.

A manifest, an index, a provenance statement and a signature come from a registry that anyone may have written. Their
cost in memory is bounded here, whatever their contents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from pipeline.errors import CorruptError

MAX_BYTES = 16 << 20
"""Limit for a manifest or an index: 50,000 files take about 8 MiB."""
MAX_VALUES = 500_000
"""Limit for the values of a document; a file of a manifest has seven brackets, commas and colons."""
MAX_KEYS = 100
"""Limit for the keys of a manifest, which has fewer than 30."""
SIGNATURE_BYTES = 256 << 10
"""Limit for a signature: with a key about 2 KiB, keyless with its certificate and log entry about 12 KiB."""
SIGNATURES = 32
"""Limit for the signatures over one document that are read."""

AGAIN = "pull or build the artifact again"
DO_NOT_USE = "do not use this artifact"
SIGNS = b",:[{"
"""At least one of these stands before each value but the first."""


def check_size(size: int, limit: int, where: str, what: str = "the manifest") -> None:
    """Reject a document that is too large to be read.

    Raises:
        CorruptError: more bytes than the limit.

    """
    if size > limit:
        raise CorruptError(f"{what} has {size:,} bytes, limit {limit:,}", where=where, fix=DO_NOT_USE)


Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(data: bytes | str, pairs: Pairs | None = None) -> Any:
    """Parse JSON text of any kind; `pairs` makes each object from its keys and values.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.

    """
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_object(data: bytes, where: str, what: str = "manifest") -> dict[str, Any]:
    """Parse JSON text that must be an object, after its limits were checked.

    Raises:
        CorruptError: too large, too many values, nested too deeply, not JSON, or not an object.

    """
    check_size(len(data), MAX_BYTES, where, f"the {what}")
    values = sum(data.count(sign) for sign in SIGNS)
    if values > MAX_VALUES:
        raise CorruptError(f"the {what} has {values:,} values, limit {MAX_VALUES:,}", where=where, fix=DO_NOT_USE)
    try:
        parsed = parse_json(data)
    except ValueError as error:
        raise CorruptError(f"damaged {what}: not JSON", where=where, fix=AGAIN) from error
    if not isinstance(parsed, dict):
        raise CorruptError(f"damaged {what}: not a JSON object", where=where, fix=AGAIN)
    return parsed


def check_counts(manifest: dict[str, Any], files: int, where: str) -> None:
    """Check the number of entries of a manifest before a model, or an error, is made of each.

    Raises:
        CorruptError: more files than the limit, more graphs or shards than files, more keys than any manifest has.

    """
    counts = {name: len(found) for name, found in manifest.items() if isinstance(found, dict | list)}
    listed = counts.get("files", files)
    for name, limit in {"files": files, "graphs": listed, "shards": listed}.items():
        if counts.get(name, 0) > limit:
            what = f"the manifest has {counts[name]:,} {name}, limit {limit:,}"
            raise CorruptError(what, where=where, fix=DO_NOT_USE)
    if len(manifest) > MAX_KEYS:
        raise CorruptError(f"the manifest has {len(manifest):,} keys, limit {MAX_KEYS}", where=where, fix=DO_NOT_USE)


def first_error(error: ValidationError) -> dict[str, Any]:
    """Return the first of a document's errors: a hostile one has many, and as records they take 500 MB."""
    text = error.json(include_url=False, include_context=False, include_input=False)
    first, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    return dict(first)
