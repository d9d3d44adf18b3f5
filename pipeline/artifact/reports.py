"""Add the reports of the gates to an artifact; reports and new manifest appear in one step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import MANIFEST, FileEntry, PairArtifact, dump, read_pair
from pipeline.files.atomic import atomic_dir, link_or_copy


def add_reports(root: Path, reports: Mapping[str, bytes], summary: dict[str, Any]) -> PairArtifact:
    """Write `reports/<name>` and the validation summary.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    manifest = read_pair(root).manifest
    added = {f"reports/{name}": data for name, data in reports.items()}
    entries = {name: _entry_of(data) for name, data in added.items()}
    updated = manifest.model_copy(update={"files": {**manifest.files, **entries}, "validation": summary})
    document = dump(updated)
    with atomic_dir(root) as folder:
        for name in manifest.files.keys() - added.keys():
            link_or_copy(root / name, folder / name)
        (folder / "reports").mkdir(exist_ok=True)
        for name, data in added.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_bytes(document)
    return PairArtifact(root, updated, data=document)


def _entry_of(data: bytes) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
