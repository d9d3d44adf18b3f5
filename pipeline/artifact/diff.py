"""What differs between two artifacts, from their manifests and recipes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.artifact.manifest import Manifest


def diff(first: Manifest, second: Manifest) -> dict[str, Any]:
    """What differs between two artifacts.

    `fields`: dotted name to both values. `files`: names added, removed and changed, by top folder (`graphs`, `weights`,
    `tokenizer`, `reports`; `other` at the top).
    """
    skip = {"files", "graphs", "shards"}
    a, b = (_flat(m.model_dump(mode="json", exclude=skip)) for m in (first, second))
    fields = {k: {"from": a.get(k), "to": b.get(k)} for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
    files: dict[str, dict[str, list[str]]] = {}
    for name in sorted(first.files.keys() | second.files.keys()):
        old, new = first.files.get(name), second.files.get(name)
        if old != new:
            kind = "added" if old is None else "removed" if new is None else "changed"
            top = name.partition("/")[0] if "/" in name else "other"
            files.setdefault(top, {}).setdefault(kind, []).append(name)
    return {"fields": fields, "files": files}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in data.items())
    return {key: value for part in parts for key, value in part.items()}
