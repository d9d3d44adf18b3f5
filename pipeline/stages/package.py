"""Compiled graphs, shards, tokenizer, recipe and lock -> an artifact directory, created atomically.

Compiles and validates nothing: validation adds its reports later (`artifact.reports`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.artifact import provenance
from pipeline.artifact.manifest import (
    MANIFEST,
    FileEntry,
    GraphEntry,
    NxdiManifest,
    PairArtifact,
    PairManifest,
    ShardEntry,
    content_digest,
    dump,
    read_pair,
)
from pipeline.artifact.verify import check_replaceable
from pipeline.cache.local import Cache
from pipeline.errors import HostError
from pipeline.files.atomic import FileDigest, atomic_dir, digest_file, link_or_copy
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import PairSpec
from pipeline.models.generation import GENERATION_CONFIG
from pipeline.models.quantisation import without_quantisation
from pipeline.models.rope import in_both_layouts
from pipeline.plan import lock as locks
from pipeline.plan.plan import Plan
from pipeline.recipe.schema import Recipe

if TYPE_CHECKING:  # for annotations only: these modules import torch
    from pipeline.backends.base import Backend
    from pipeline.stages.compile import Compiled
    from pipeline.stages.shard import Shards
    from pipeline.stages.shard_files import ShardFile

UNVERSIONED = "unversioned"
"""Version in a manifest until its content is complete."""

SealedManifest = TypeVar("SealedManifest", PairManifest, NxdiManifest)
VERSION_LENGTH = 12


@dataclass(frozen=True)
class Parts:
    """The results of a build's stages, to be packaged."""

    plan: Plan
    lock: locks.Lock
    graphs: tuple[Compiled, ...]
    shards: Shards
    tokenizer: Mapping[str, bytes]
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """The origin of an artifact, for its provenance: recipe, lock, and backend settings as plain data."""

    recipe: Recipe
    lock: locks.Lock
    backend: Mapping[str, Any]
    toolchain: Mapping[str, str]
    flags: Mapping[str, str]


def package(out: Path, parts: Parts, backend: Backend, cache: Path) -> PairArtifact:
    """Assemble an artifact and replace `out` by it in one step. Graphs and shards are hard-linked.

    Raises:
        HostError: no space, or a cached graph or shard is missing or damaged.
        InputError: `out` is not an artifact.

    """
    check_replaceable(out)
    plan = parts.plan
    config = without_quantisation(in_both_layouts(parts.lock.target.config, plan.pair.target.max_position))
    toolchain, flags = backend.toolchain().as_dict(), backend.flags()
    origin = Origin(plan.recipe, parts.lock, plan.recipe.backend.model_dump(), toolchain, flags)
    with atomic_dir(out) as folder:
        shards = dict(_add_shards(folder, parts.shards))
        for graph in parts.graphs:
            _add_graph(folder, graph, plan.pair, backend, Cache(cache, "graphs"))
        _write_json(folder / "config.json", config)
        _write_json(folder / GENERATION_CONFIG, parts.generation)
        (folder / "tokenizer").mkdir()
        for name, data in parts.tokenizer.items():
            (folder / "tokenizer" / name).write_bytes(data)
        # Servers read the model type from a config.json in the tokenizer's folder.
        _write_json(folder / "tokenizer/config.json", config)
        seal(folder, _manifest(parts, backend), origin, shards)
    return read_pair(out)


def seal(
    folder: Path, manifest: SealedManifest, origin: Origin, entries: Mapping[str, FileEntry] | None = None
) -> SealedManifest:
    """Make a folder an artifact: recipe, lock, provenance, and the manifest, which lists every file in it.

    `manifest` lacks only files and version. Files in `entries` are not read again.
    """
    (folder / "recipe.yaml").write_text(origin.recipe.to_yaml(), encoding="utf-8")
    locks.write(folder / "recipe.lock", origin.lock)
    files = _add_provenance(folder, _digests(folder, entries or {}), origin, manifest.created)
    complete = manifest.model_copy(update={"files": files})
    sealed = complete.model_copy(update={"version": content_digest(complete)[:VERSION_LENGTH]})
    (folder / MANIFEST).write_bytes(dump(sealed))
    return sealed


def _add_shards(folder: Path, shards: Shards) -> Iterator[tuple[str, FileEntry]]:
    """Link the shards and yield their entries; the shard stage has just written them or compared their digests."""
    for shard in shards.files:
        name = shard.path.as_posix()
        link_or_copy(shards.root / name, folder / name)
        yield name, FileEntry(sha256=shard.sha256, size=shard.size)


def _add_graph(folder: Path, graph: Compiled, pair: PairSpec, backend: Backend, cache: Cache) -> None:
    stored = cache.get(graph.key)
    if stored is None:
        what = "a compiled graph in the cache is missing or damaged"
        raise HostError(what, where=graph.spec.name, fix="run the build again")
    place = folder / "graphs" / graph.spec.name
    link_or_copy(stored, place / backend.graph_file)
    _write_json(place / "io.json", signature(graph.spec, pair, backend.packing).to_json())
    _write_json(place / "flags.json", backend.flags())


def _add_provenance(folder: Path, files: dict[str, FileEntry], origin: Origin, created: str) -> dict[str, FileEntry]:
    """Write provenance and SBOM of this build; return the entries of all files with these."""
    from pipeline.artifact.sbom import sbom  # keeps an extra out of `tandem vllm-cache` and `tandem vllm-args`

    recipe, lock = origin.recipe, origin.lock
    sources = {"target": lock.target, "draft": lock.draft}
    inputs = {role: asdict(source) for role, source in sources.items() if source is not None}
    digests = recipe.digest(), locks.digest(lock)
    build = provenance.Build(recipe.name, created, *digests, origin.backend, origin.flags, origin.toolchain, inputs)
    subjects = {name: entry.sha256 for name, entry in files.items()}
    _write_json(folder / provenance.PROVENANCE, provenance.statement(build, subjects))
    _write_json(folder / provenance.SBOM, sbom(created, origin.toolchain))
    written = (provenance.PROVENANCE, provenance.SBOM)
    return files | {name: _entry(digest_file(folder / name)) for name in written}


def _manifest(parts: Parts, backend: Backend) -> PairManifest:
    """Return the manifest of a pair without its files and version."""
    recipe = parts.plan.recipe
    return PairManifest(
        name=recipe.name,
        version=UNVERSIONED,
        created=created_now(),
        recipe_digest=recipe.digest(),
        lock_digest=locks.digest(parts.lock),
        toolchain=backend.toolchain().as_dict(),
        backend=recipe.backend,
        requires=backend.requires(),
        pair=parts.plan.pair,
        graphs=tuple(_graph_entry(graph, backend.graph_file) for graph in parts.graphs),
        shards=tuple(_shard_entry(shard) for shard in parts.shards.files),
        step_costs=recipe.speculation.step_costs,
        lookup=recipe.speculation.lookup,
        files={},
    )


def _graph_entry(graph: Compiled, graph_file: str) -> GraphEntry:
    folder = f"graphs/{graph.spec.name}"
    return GraphEntry(spec=graph.spec, key=graph.key, file=f"{folder}/{graph_file}", io=f"{folder}/io.json")


def _shard_entry(shard: ShardFile) -> ShardEntry:
    return ShardEntry(model=shard.model, rank=shard.rank, file=shard.path.as_posix())


def _digests(folder: Path, entries: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Return the entry of every file; files in `entries` are not read again."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: entries[name] if name in entries else _entry(digest_file(path)) for name, path in names.items()}


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(sha256=digest.sha256, size=digest.size)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def created_now() -> str:
    """Return the current time, or $SOURCE_DATE_EPOCH (reproducible-builds.org/specs/source-date-epoch)."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
