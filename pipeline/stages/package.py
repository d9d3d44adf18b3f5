"""Compiled graphs + shards + tokenizer + recipe and lock -> an artifact directory, complete or not there at all.

Compiles nothing and judges nothing: reports come later, from validation, through `add_reports`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import provenance
from pipeline.artifact.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    GraphEntry,
    Manifest,
    ShapesEntry,
    ShardEntry,
    check_replaceable,
    content_digest,
    dump,
    read,
)
from pipeline.cache.local import Cache
from pipeline.errors import HostError
from pipeline.files.atomic import FileDigest, atomic_dir, digest_file, link_or_copy
from pipeline.graphs.signature import signature
from pipeline.plan import lock as locks

if TYPE_CHECKING:
    from pipeline.backends.base import Backend
    from pipeline.plan.plan import Plan
    from pipeline.stages.compile import Compiled
    from pipeline.stages.shard import ShardFile

VERSION_LENGTH = 12


@dataclass(frozen=True)
class Facts:
    """What an artifact tells of itself: its plan and lock, and the backend that made it, as plain data."""

    plan: Plan
    lock: locks.Lock
    backend: Mapping[str, Any]
    toolchain: Mapping[str, str]
    flags: Mapping[str, str]
    requires: Mapping[str, str]
    graphs: tuple[GraphEntry, ...] = ()
    shards: tuple[ShardEntry, ...] = ()


def package(
    out: Path,
    plan: Plan,
    backend: Backend,
    lock: locks.Lock,
    compiled: Sequence[Compiled],
    shards: Sequence[ShardFile],
    weights: Path,
    tokenizer: Mapping[str, bytes],
    cache: Path,
) -> Artifact:
    """Assemble the artifact aside and put it in the place of `out` in one step. Graphs and shards are hard-linked.

    Raises:
        HostError: no space, or a cached graph or shard vanished or is damaged.
        InputError: `out` holds something else.

    """  # fmt: skip
    check_replaceable(out)
    facts = Facts(
        plan, lock, plan.recipe.backend.model_dump(), backend.toolchain().as_dict(), backend.flags(),
        backend.requires(), tuple(_graph_entry(one, backend.graph_file) for one in compiled),
        tuple(_shard_entry(one) for one in shards),
    )  # fmt: skip
    with atomic_dir(out) as folder:
        known = dict(_add_shards(folder, shards, weights))
        for one in compiled:
            _add_graph(folder, one, plan, backend, Cache(cache))
        _write_json(folder / "config.json", lock.target.config)
        _write_json(folder / "generation_config.json", _generation(plan))
        (folder / "tokenizer").mkdir()
        for name, data in tokenizer.items():
            (folder / "tokenizer" / name).write_bytes(data)
        # Servers look beside a tokenizer for the kind of model it belongs to.
        _write_json(folder / "tokenizer/config.json", lock.target.config)
        seal(folder, facts, known)
    return read(out)


def _generation(plan: Plan) -> dict[str, Any]:
    """What servers assume of a request that does not say: where answers end, and greedy if nothing else was built."""
    greedy = "stochastic" not in plan.recipe.speculation.sampling
    return {"eos_token_id": list(plan.pair.target.eos_ids)} | ({"temperature": 0.0} if greedy else {})


def seal(folder: Path, facts: Facts, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Make a folder an artifact: recipe, lock, provenance, and the manifest, which lists every file in it.

    Files in `known` are taken at their word.
    """
    (folder / "recipe.yaml").write_text(facts.plan.recipe.to_yaml())
    locks.write(folder / "recipe.lock", facts.lock)
    files = _add_provenance(folder, _digests(folder, known or {}), facts)
    manifest = _manifest(files, facts)
    (folder / MANIFEST).write_bytes(dump(manifest))
    return manifest


def add_reports(root: Path, reports: Mapping[str, bytes], summary: dict[str, Any]) -> Artifact:
    """Put `reports/<name>` and the validation summary into an artifact: all of them appear in one step.

    Raises:
        HostError: no space, read-only or forbidden.

    """
    manifest = read(root).manifest
    added = {f"reports/{name}": data for name, data in reports.items()}
    entries = {name: _entry(FileDigest(hashlib.sha256(data).hexdigest(), len(data))) for name, data in added.items()}
    new = manifest.model_copy(update={"files": {**manifest.files, **entries}, "validation": summary})
    with atomic_dir(root) as folder:
        for name in manifest.files.keys() - added.keys():
            link_or_copy(root / name, folder / name)
        (folder / "reports").mkdir(exist_ok=True)
        for name, data in added.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_bytes(dump(new))
    return Artifact(root, new)


def _add_shards(folder: Path, shards: Sequence[ShardFile], weights: Path) -> Iterator[tuple[str, FileEntry]]:
    """Link the shards, which the shard stage has just written or compared with their digests."""
    for shard in shards:
        name = shard.path.as_posix()
        link_or_copy(weights / name, folder / name)
        yield name, FileEntry(sha256=shard.sha256, size=shard.size)


def _add_graph(folder: Path, one: Compiled, plan: Plan, backend: Backend, cache: Cache) -> None:
    stored = cache.get(one.key)
    if stored is None:
        what = "a compiled graph vanished from the cache, or was damaged"
        raise HostError(what, where=one.spec.name, fix="run the build again")
    place = folder / "graphs" / one.spec.name
    link_or_copy(stored, place / backend.graph_file)
    _write_json(place / "io.json", signature(one.spec, plan.pair, backend.packing).to_json())
    _write_json(place / "flags.json", backend.flags())


def _add_provenance(folder: Path, files: dict[str, FileEntry], facts: Facts) -> dict[str, FileEntry]:
    """Write what tells of this build, over all other files; returns their entries with these."""
    recipe, lock = facts.plan.recipe, facts.lock
    sources = {"target": lock.target, "draft": lock.draft}
    build = provenance.Build(
        recipe.name, _created(), recipe.digest(), locks.digest(lock), facts.backend, facts.flags, facts.toolchain,
        {role: asdict(source) for role, source in sources.items() if source is not None},
    )  # fmt: skip
    subjects = {name: entry.sha256 for name, entry in files.items()}
    _write_json(folder / provenance.PROVENANCE, provenance.statement(build, subjects))
    _write_json(folder / provenance.SBOM, provenance.sbom(build))
    made = (provenance.PROVENANCE, provenance.SBOM)
    return files | {name: _entry(digest_file(folder / name)) for name in made}


def _manifest(files: dict[str, FileEntry], facts: Facts) -> Manifest:
    recipe = facts.plan.recipe
    manifest = Manifest(
        name=recipe.name,
        version="unversioned",
        created=_created(),
        recipe_digest=recipe.digest(),
        lock_digest=locks.digest(facts.lock),
        toolchain=dict(facts.toolchain),
        backend=dict(facts.backend),
        requires=dict(facts.requires),
        tensor=facts.plan.pair.models.tp,
        dtype=recipe.target.dtype,
        weights=recipe.target.weights,
        shapes=ShapesEntry(**recipe.shapes.model_dump()),
        method=recipe.speculation.method,
        draft_tokens=recipe.speculation.draft_tokens,
        step_costs=recipe.speculation.step_costs,
        lookup=recipe.speculation.lookup,
        sampling=recipe.speculation.sampling,
        candidates=recipe.speculation.candidates,
        vocab=facts.plan.pair.target.vocab,
        eos_ids=facts.plan.pair.target.eos_ids,
        graphs=facts.graphs,
        shards=facts.shards,
        files=files,
    )
    return manifest.model_copy(update={"version": content_digest(manifest)[:VERSION_LENGTH]})


def _graph_entry(one: Compiled, graph_file: str) -> GraphEntry:
    name = one.spec.name
    paths = {"file": f"graphs/{name}/{graph_file}", "io": f"graphs/{name}/io.json"}
    return GraphEntry.model_validate({"name": name, "key": one.key, **paths, **asdict(one.spec)})


def _shard_entry(one: ShardFile) -> ShardEntry:
    return ShardEntry.model_validate({"model": one.model, "rank": one.rank, "file": one.path.as_posix()})


def _digests(folder: Path, known: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Every file of the artifact; those that are known are not read again."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: known[name] if name in known else _entry(digest_file(path)) for name, path in names.items()}


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(sha256=digest.sha256, size=digest.size)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def _created() -> str:
    """Now, or the time that a reproducible build is told to claim (reproducible-builds.org/specs/source-date-epoch)."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
