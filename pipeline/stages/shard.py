"""The shard stage: take the weight shards of an earlier build with the same weights and layout, or write new ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.artifact.manifest import FileEntry
from pipeline.artifact.verify import differences
from pipeline.files.atomic import resumable_dir
from pipeline.graphs.packing import Packing
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.quantisation import Quantisation, read_quantisation
from pipeline.progress import Log, Progress, stage
from pipeline.sources.checkpoint import Checkpoint
from pipeline.stages.downloads import read_record
from pipeline.stages.shard_files import ShardFile, write_shards
from pipeline.stages.stamp import build_lock

LISTING = "shards.json"
RECORDS = TypeAdapter(list[ShardFile])


@dataclass(frozen=True)
class Shards:
    """Shard files, by paths below `root`."""

    root: Path
    files: tuple[ShardFile, ...]
    found: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the weight files that were read where they are stored, by address."""


def shard(
    models: ModelsSpec, pair: tuple[Checkpoint, Checkpoint], packing: Packing, cache: Path, log: Log, progress: Progress
) -> Shards:  # fmt: skip
    """Write the shards of both models into the cache, unless undamaged ones are cached. Continues a killed call.

    Raises:
        SourceError: a checkpoint that cannot be read to its end, or a value that the dtype cannot hold.
        HostError: not enough space.

    """
    root = cache / "shards" / shard_key(models, pair, packing)
    with build_lock(root.with_suffix(".lock"), log, "a build that writes the same shards"):
        cached = _cached(root, log)
        if cached is not None:
            log("shard: the shards are cached")
            return Shards(root, tuple(cached), read_record(root))
        ranks = "1 rank" if models.tp == 1 else f"{models.tp} ranks"
        with stage(f"shard: weights for {ranks}", log, progress), resumable_dir(root) as folder:
            written = write_shards(
                models, *pair, folder, packing=packing, progress=lambda done, total: progress("shard", done, total)
            )
            files = [replace(file, path=file.path.relative_to(folder)) for file in written]
            (folder / LISTING).write_bytes(RECORDS.dump_json(files))
    return Shards(root, tuple(files), read_record(root))


def shard_key(models: ModelsSpec, pair: tuple[Checkpoint, Checkpoint], packing: Packing) -> str:
    """Return the key of the shards: a digest of what decides their bytes, without facts of graphs."""
    facts: Mapping[str, object] = {
        "models": asdict(models),
        "packing": packing.name,
        "revisions": [[checkpoint.revision, checkpoint.layers] for checkpoint in pair],
        "quantised": [asdict(found) if (found := _quantisation(checkpoint)) else None for checkpoint in pair],
        "files": [sorted((name, digest.sha256) for name, digest in checkpoint.files.items()) for checkpoint in pair],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _quantisation(checkpoint: Checkpoint) -> Quantisation | None:
    return read_quantisation(checkpoint.config_json, str(checkpoint.root))


def _cached(root: Path, log: Log) -> list[ShardFile] | None:
    """Return the shards of an earlier build after comparing their digests; None if they must be written."""
    if not root.exists():
        return None
    try:
        files = RECORDS.validate_json((root / LISTING).read_bytes())
        entries = {file.path.as_posix(): FileEntry(sha256=file.sha256, size=file.size) for file in files}
        faults = differences(root, entries)
    except ValidationError:
        faults = [f"{LISTING} is damaged"]
    except OSError as error:
        faults = [f"{error.filename}: {error.strerror}"]
    if not faults:
        with contextlib.suppress(OSError):  # time of the last use, for `tandem cache gc`
            os.utime(root / LISTING)
        return files
    log(f"shard: cached shards are damaged ({'; '.join(faults)}): written again")
    shutil.rmtree(root, ignore_errors=True)
    return None
