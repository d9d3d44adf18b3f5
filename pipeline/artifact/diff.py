"""The differences between two artifacts, from their manifests alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.artifact.manifest import Manifest


def diff(first: Manifest, second: Manifest) -> dict[str, Any]:
    """Return the differences between two artifacts.

    `fields`: dotted name to both values. `files`: names added, removed and changed, by top folder (`graphs`, `weights`,
    `tokenizer`, `reports`; `other` at the top).
    """
    skip = {"files", "graphs", "shards"}
    first_fields, second_fields = (
        _flat(manifest.model_dump(mode="json", exclude=skip)) for manifest in (first, second)
    )
    names = sorted(first_fields.keys() | second_fields.keys())
    pairs = {name: (first_fields.get(name), second_fields.get(name)) for name in names}
    fields = {name: {"from": before, "to": after} for name, (before, after) in pairs.items() if before != after}
    files: dict[str, dict[str, list[str]]] = {}
    for name in sorted(first.files.keys() | second.files.keys()):
        before, after = first.files.get(name), second.files.get(name)
        if before != after:
            kind = "added" if before is None else "removed" if after is None else "changed"
            top = name.partition("/")[0] if "/" in name else "other"
            files.setdefault(top, {}).setdefault(kind, []).append(name)
    return {"fields": fields, "files": files}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in data.items())
    return {key: value for part in parts for key, value in part.items()}
