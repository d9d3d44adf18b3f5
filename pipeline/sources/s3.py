"""Checkpoints in an S3 bucket: `s3://bucket/prefix`, a folder in Hugging Face layout. Weights are read by ranges there.

Only configs and tokenizers are downloaded. The revision is a digest of what the bucket lists: names, sizes, ETags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.files.atomic import write_atomic
from pipeline.progress import Progress
from pipeline.sources.base import Fetched
from pipeline.sources.checkpoint import CONFIG_FILES, TOKENIZER_FILES, indexed_files, read_json, refuse_without_weights
from pipeline.sources.custom_code import CODE_FILES
from pipeline.sources.pointers import INDEX, SINGLE
from pipeline.sources.remote import RemoteFile
from pipeline.stores.base import Bucket, Listing, open_bucket

SMALL = (*CONFIG_FILES, *TOKENIZER_FILES, *CODE_FILES, INDEX)


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the small files' folder, the revision, and the weight files, of which no byte was read.

    Raises:
        SourceError: no such prefix, no config, or no safetensors.
        HostError: the server cannot be read, or its client is not installed.

    """
    del base, progress  # of folders; small files only
    where = f"s3://{location}"
    bucket = open_bucket(where)
    listed = _listed(bucket)
    if "config.json" not in listed:
        raise SourceError("no config.json under this prefix", where=where, fix="name the folder of a model")
    refuse_without_weights(listed, where)
    revision = _revision(listed)
    root = cache / "s3" / revision.rpartition(":")[2][:32]
    for name in SMALL:
        if name in listed and not (root / name).is_file():
            root.mkdir(parents=True, exist_ok=True)
            write_atomic(root / name, _content(bucket, name, where))
    names = _weights(root, listed, where)
    return Fetched(root, revision, {name: _remote(bucket, listed[name], where) for name in names})


def moving(location: str) -> bool:
    """Return True: objects can be replaced."""
    del location
    return True


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return a digest of what the prefix lists now.

    Raises:
        HostError: the server cannot be read.

    """
    del timeout_s  # the client has its own
    return _revision(_listed(open_bucket(f"s3://{location}")))


def _listed(bucket: Bucket) -> dict[str, Listing]:
    """Return the files of a model directly under the prefix."""
    entries = {entry.key: entry for entry in bucket.list("")}
    return {name: entries[name] for name in sorted(entries) if name in SMALL or _is_weights(name)}


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _revision(listed: Mapping[str, Listing]) -> str:
    text = "".join(f"{entry.token}  {entry.size}  {name}\n" for name, entry in listed.items())
    return "etags:" + hashlib.sha256(text.encode()).hexdigest()


def _content(bucket: Bucket, name: str, where: str) -> bytes:
    found = bucket.get(name)
    if found is None:
        raise SourceError("object was removed while the prefix was read", where=f"{where}/{name}", fix="try again")
    return found.data


def _weights(root: Path, listed: Mapping[str, Listing], where: str) -> list[str]:
    """Return the weight files as in a folder: one file before an index."""
    weights = [name for name in listed if _is_weights(name)]
    if SINGLE in listed or INDEX not in listed:
        names = [SINGLE] if SINGLE in listed else weights
        if len(names) > 1:
            raise SourceError(f"{len(names)} safetensors files but no {INDEX}", where=where, fix=f"add {INDEX}")
        return names
    names = indexed_files(read_json(root / INDEX, "upload the model again"), f"{where}/{INDEX}")
    missing = sorted(set(names) - set(weights))
    if missing:
        raise SourceError(f"{INDEX} names {missing[0]}, which is missing", where=where, fix="upload the model again")
    return names


def _remote(bucket: Bucket, entry: Listing, where: str) -> RemoteFile:
    fetch = partial(
        bucket.read, entry.key, token=entry.token or None
    )  # an object that is replaced meanwhile is an error
    return RemoteFile(entry.key, entry.size, f"{where}/{entry.key}", fetch)
