"""Rejects checkpoints that need custom code: Tandem never runs code of a source. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import SourceError
from pipeline.files.limits import parse_json
from pipeline.models.dflash import is_dflash

CODE_FILES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files in which transformers reads `auto_map`, the names of a checkpoint's own classes."""

FIX = "use a checkpoint without custom code; if a class of transformers reads this one, remove `auto_map` from a copy"


def refuse_custom_code(document: bytes, where: str) -> None:
    """Raise an error if a file of a checkpoint names code to run.

    Only transformers' auto classes run such code, so other names (speculators writes an empty one) are no error. The
    class that a DFlash draft names is no error either: transformers never reads such a draft, and no target is one.

    Raises:
        SourceError: `auto_map` with an auto class; names the class and its code.

    """
    table = _auto_map(document)
    named = {name: _references(value) for name, value in table.items() if name.startswith("Auto")}
    code = "; ".join(f"{name}: {', '.join(references)}" for name, references in named.items() if references)
    if code:
        raise SourceError(f"`auto_map` names custom code, which Tandem does not run: {code}", where=where, fix=FIX)


def _auto_map(document: bytes) -> Mapping[str, Any]:
    """Return `auto_map`; empty for a malformed file or a DFlash draft, of which transformers runs nothing either."""
    try:
        data = parse_json(document)
    except ValueError:
        return {}
    table = data.get("auto_map") if isinstance(data, dict) and not is_dflash(data) else None
    if isinstance(table, list):  # the older format of tokenizers
        return {"AutoTokenizer": table}
    return table if isinstance(table, dict) else {}


def _references(value: Any) -> list[str]:
    """Return the classes of an entry; of a tokenizer, both the slow and the fast one."""
    values = value if isinstance(value, list) else [value]
    return [str(reference) for reference in values if reference]
