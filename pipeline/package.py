"""Compiled graphs + shards + tokenizer + recipe and lock -> an artifact directory, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.artifact import MANIFEST, Artifact, FileEntry, GraphEntry, Manifest, ShapesEntry, dump, read
from pipeline.cache import Cache
from pipeline.errors import HostError
from pipeline.files import atomic_dir, digest_file, link_or_copy, write_atomic
from pipeline.lock import Lock, digest
from pipeline.signature import signature

if TYPE_CHECKING:
    from pipeline.backends.base import Backend
    from pipeline.compile import Compiled
    from pipeline.plan import Plan
    from pipeline.shard import ShardFile
    from pipeline.sources import Checkpoint


def package(
    out: Path, plan: Plan, backend: Backend, lock: Lock, compiled: Sequence[Compiled],
    shards: Sequence[ShardFile], weights: Path, target: Checkpoint, cache: Path,
) -> Artifact:  # fmt: skip
    """Assemble the artifact aside and put it in the place of `out` in one step. Large files are hard-linked.

    Raises:
        HostError: no space, or a cached graph vanished meanwhile.
    """
    with atomic_dir(out) as folder:
        for one in compiled:
            _add_graph(folder, one, plan, backend, Cache(cache))
        known = {}
        for shard in shards:
            link_or_copy(weights / shard.path, folder / shard.path)
            known[shard.path.as_posix()] = FileEntry(sha256=shard.sha256, size=shard.size)
        for name in target.tokenizer_files:
            link_or_copy((target.root / name).resolve(), folder / "tokenizer" / name)
        _add_texts(folder, plan, backend, lock)
        (folder / MANIFEST).write_bytes(dump(_manifest(folder, plan, backend, lock, compiled, known)))
    return read(out)


def add_reports(root: Path, reports: Mapping[str, bytes], summary: dict[str, Any]) -> Artifact:
    """Write `reports/<name>` and the validation summary into an artifact; the manifest goes last."""
    manifest = read(root).manifest
    files = dict(manifest.files)
    for name, data in reports.items():
        write_atomic(root / "reports" / name, data)
        files[f"reports/{name}"] = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    write_atomic(root / MANIFEST, dump(manifest.model_copy(update={"files": files, "validation": summary})))
    return read(root)


def _add_graph(folder: Path, one: Compiled, plan: Plan, backend: Backend, cache: Cache) -> None:
    stored = cache.get(one.key)
    if stored is None:
        raise HostError("a compiled graph vanished from the cache", where=one.spec.name, fix="run the build again")
    place = folder / "graphs" / one.spec.name
    link_or_copy(stored, place / backend.graph_file)
    io = signature(one.spec, plan.pair, backend.packing).to_json()
    (place / "io.json").write_text(json.dumps(io, sort_keys=True))
    (place / "flags.json").write_text(json.dumps(backend.flags(), sort_keys=True))


def _add_texts(folder: Path, plan: Plan, backend: Backend, lock: Lock) -> None:
    recipe = plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "recipe.lock").write_text(json.dumps(asdict(lock), indent=1, sort_keys=True))
    provenance = {
        "recipe_digest": _recipe_digest(plan),
        "lock_digest": digest(lock),
        "toolchain": backend.toolchain().as_dict(),
        "source_commit": _commit(),
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1, sort_keys=True))


def _manifest(
    folder: Path, plan: Plan, backend: Backend, lock: Lock, compiled: Sequence[Compiled], known: dict[str, FileEntry]
) -> Manifest:
    recipe = plan.recipe
    files = known | {
        path.relative_to(folder).as_posix(): FileEntry(**asdict(digest_file(path)))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in known
    }
    content = json.dumps({name: entry.sha256 for name, entry in sorted(files.items()) if name != "provenance.json"})
    return Manifest(
        name=recipe.name,
        version=hashlib.sha256(content.encode()).hexdigest()[:12],
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))),
        recipe_digest=_recipe_digest(plan),
        lock_digest=digest(lock),
        toolchain=backend.toolchain().as_dict(),
        backend=recipe.backend.model_dump(),
        requires=backend.requires(),
        tensor=plan.pair.tp,
        dtype=recipe.target.dtype,
        shapes=ShapesEntry(**recipe.shapes.model_dump()),
        draft_tokens=recipe.speculation.draft_tokens,
        sampling=recipe.speculation.sampling,
        candidates=recipe.speculation.candidates,
        eos_ids=plan.pair.target.eos_ids,
        graphs=tuple(GraphEntry(**asdict(one.spec), key=one.key) for one in compiled),
        files=files,
    )


def _recipe_digest(plan: Plan) -> str:
    return hashlib.sha256(plan.recipe.model_dump_json(by_alias=True).encode()).hexdigest()


def _commit() -> str:
    """The commit that is built from, if this is a checkout."""
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
