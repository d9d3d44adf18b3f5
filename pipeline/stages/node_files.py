"""Sources and artifacts on the nodes of a cluster: files of the shared cache, linked into folders of the node's cache.

Weights that stay in a store are read there by the nodes as well, with their own credentials.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact.manifest import MANIFEST, PairArtifact
from pipeline.cache.backed import received_file, send_files
from pipeline.cache.collect import SENT
from pipeline.cache.remote import Remote
from pipeline.errors import SourceError
from pipeline.files.atomic import FileDigest, atomic_dir, link_or_copy
from pipeline.progress import Log, no_progress
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import NO_FILES, STREAM, Checkpoint
from pipeline.sources.heads import remade
from pipeline.sources.kinds import fetch

Files = Mapping[str, FileDigest]
"""Digests by path."""


@dataclass(frozen=True)
class SentPair:
    """Target and draft for nodes: their files are in the shared cache.

    `sources` are the addresses of weights that stay in a store, empty for a checkpoint that was sent whole.
    """

    pair: tuple[Checkpoint, Checkpoint]
    sources: tuple[str, str]
    base: Path


@dataclass(frozen=True)
class SentArtifact:
    """An artifact for nodes: its files are in the shared cache."""

    manifest: bytes
    files: Files


def send_pair(remote: Remote, pair: tuple[Checkpoint, Checkpoint], recipe: Recipe, base: Path, log: Log) -> SentPair:
    """Store the files of target and draft in the shared cache, except weights that stay in a store.

    Raises:
        HostError: the shared cache cannot be written.

    """
    send_files(remote, {digest: of.root / name for of in pair for name, digest in _here(of).items()}, log)
    target, draft = recipe.target.source, recipe.draft.source or recipe.target.source
    sources = [source if of.remote else "" for of, source in zip(pair, (target, draft), strict=True)]
    target_sent, draft_sent = (replace(of, remote=NO_FILES) for of in pair)
    return SentPair((target_sent, draft_sent), (sources[0], sources[1]), base.absolute())


def received_pair(remote: Remote, sent: SentPair, cache: Path) -> tuple[Checkpoint, Checkpoint]:
    """Return target and draft on a node.

    Raises:
        HostError: the shared cache or a store cannot be read. SourceError: a source has changed.

    """
    target, draft = (
        _received(remote, of, source, sent.base, cache) for of, source in zip(sent.pair, sent.sources, strict=True)
    )
    return target, draft


def send_artifact(remote: Remote, artifact: PairArtifact, log: Log) -> SentArtifact:
    """Store the files of an artifact in the shared cache.

    Raises:
        HostError: the shared cache cannot be written.

    """
    files = {name: FileDigest(entry.sha256, entry.size) for name, entry in artifact.manifest.files.items()}
    send_files(remote, {digest: artifact.root / name for name, digest in files.items()}, log)
    return SentArtifact((artifact.root / MANIFEST).read_bytes(), files)


def received_artifact(remote: Remote, sent: SentArtifact, cache: Path) -> Path:
    """Return the folder of an artifact on a node.

    Raises:
        HostError: the shared cache cannot be read.

    """
    return _folder(remote, sent.files, cache, {MANIFEST: sent.manifest})


def _here(checkpoint: Checkpoint) -> Files:
    return {name: digest for name, digest in checkpoint.files.items() if name not in checkpoint.remote}


def _received(remote: Remote, sent: Checkpoint, source: str, base: Path, cache: Path) -> Checkpoint:
    if not source:
        return remade(replace(sent, root=_folder(remote, sent.files, cache)), cache / "sources")
    with _streamed():
        fetched = fetch(source, base=base, cache=cache / "sources", progress=no_progress)
    if sent.revision.partition("#")[0] != fetched.revision:
        what = f"the source has changed: revision {fetched.revision}, expected {sent.revision}"
        raise SourceError(what, where=source, fix="run the build again")
    small = {name: digest for name, digest in sent.files.items() if name not in fetched.remote}
    received = replace(sent, root=_folder(remote, small, cache), remote=fetched.remote)
    return remade(received, cache / "sources")


@contextlib.contextmanager
def _streamed() -> Iterator[None]:
    """Leave weights where they are stored, as the machine of the build does."""
    before = os.environ.get(STREAM)
    os.environ[STREAM] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[STREAM]
        else:
            os.environ[STREAM] = before


def _folder(remote: Remote, files: Files, cache: Path, small: Mapping[str, bytes] | None = None) -> Path:
    """Return a folder with these files, made once on each node."""
    texts = {name: data.hex() for name, data in (small or {}).items()}
    facts = json.dumps([sorted((name, digest.sha256) for name, digest in files.items()), texts], sort_keys=True)
    folder = cache / SENT / hashlib.sha256(facts.encode()).hexdigest()
    if not folder.is_dir():
        with atomic_dir(folder) as new:
            for name, digest in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(received_file(remote, cache, digest), new / name)
            for name, data in (small or {}).items():
                (new / name).write_bytes(data)
    os.utime(folder)  # time of the last use, for `tandem cache gc`
    return folder
