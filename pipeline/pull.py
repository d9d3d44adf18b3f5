"""Release -> verified artifact directory: blobs are checked while they stream, resumed, shared, and linked into place.

Loads and runs nothing. Blobs already here are hard-linked, after they were checked. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from pipeline import artifact
from pipeline.artifact import MANIFEST, FileEntry, Progress, check_replaceable, difference, silent
from pipeline.cache import default_root
from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.files import atomic_dir, check_space, disk_errors, link_or_copy, sync_folder, write_atomic
from pipeline.publish import find_release
from pipeline.stores.base import Store, open_store

PARALLEL = 8
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Reference:
    """`REGISTRY/NAME@VERSION-or-ALIAS`, taken apart."""

    url: str
    name: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.url}/{self.name}@{self.wanted}"


def pull(
    reference: str,
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    only: Sequence[str] | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Path:
    """Pull a release into `directory` (default `artifacts/pulled/<name>`), complete or not at all; returns it.

    `only` takes the files that match its patterns (`weights/*/rank-0-*`), a part that `artifact.verify(..., only=...)`
    checks. `offline` asks nobody: the release must have been pulled before.

    Raises:
        InputError: no such release or alias, or `directory` holds something else than an artifact.
        ArtifactError: a blob that does not match its digest, an unsafe path, a manifest of another release.
        HostError: no space, a registry that cannot be reached, or, offline, what was never pulled.

    """  # fmt: skip
    ref = parse_reference(reference)
    out = directory or Path("artifacts/pulled") / ref.name
    check_replaceable(out)
    blobs = Blobs((cache or default_root()) / "blobs")
    store = None if offline else open_store(ref.url)
    data = _remembered(ref, blobs) if store is None else _find(ref, store, blobs)
    manifest = artifact.parse(data, str(ref))
    if manifest.name != ref.name:
        what = f"the manifest is of {manifest.name!r}, asked was {ref.name!r}"
        raise ArtifactError(what, where=str(ref), fix="publish it again")
    files = artifact.select(manifest, only)
    if not files:
        raise InputError(f"no file matches {', '.join(only or ())}", where=str(ref), fix="see `tandem inspect`")
    blobs.bring(store, files, progress)
    with atomic_dir(out) as folder:
        for path, entry in files.items():
            link_or_copy(blobs.path(entry.sha256), folder / path)
        (folder / MANIFEST).write_bytes(data)
    return out


def parse_reference(reference: str) -> Reference:
    """Take a reference apart; without `@`, it means the alias `latest`.

    Raises:
        InputError: it has no registry or no name.

    """
    url, _, last = reference.rpartition("/")
    name, _, wanted = last.partition("@")
    if not (url and name) or (not wanted and "@" in last):
        fix = "for example artifacts/registry/pico-spec@latest"
        raise InputError(f"{reference!r} is not REGISTRY/NAME@VERSION", where="pull", fix=fix)
    return Reference(url, name, wanted or "latest")


def _find(ref: Reference, store: Store, blobs: Blobs) -> bytes:
    """The manifest, remembered for a time without network."""
    version, data = find_release(store, ref.name, ref.wanted, ref.url)
    found = artifact.parse(data, str(ref)).version
    if found != version:
        raise ArtifactError(
            f"the manifest is of version {found}, asked was {version}", where=str(ref), fix="publish it again"
        )
    for wanted in {ref.wanted, version}:
        write_atomic(_memory(Reference(ref.url, ref.name, wanted), blobs), data)
    return data


def _remembered(ref: Reference, blobs: Blobs) -> bytes:
    try:
        return _memory(ref, blobs).read_bytes()
    except FileNotFoundError as error:
        raise HostError(
            "this release was never pulled here", where=str(ref), fix="pull it once with a network"
        ) from error


def _memory(ref: Reference, blobs: Blobs) -> Path:
    return blobs.root / "manifests" / f"{hashlib.sha256(str(ref).encode()).hexdigest()}.json"


@dataclass
class _Meter:
    """Adds up bytes from several threads and reports them one at a time."""

    report: Progress
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size_bytes: int) -> None:
        with self.lock:
            self.done += size_bytes
            self.report(self.done, self.total)


@dataclass(frozen=True)
class Blobs:
    """The local store of blobs that pulled artifacts are linked from, shared by processes."""

    root: Path

    def path(self, sha256: str) -> Path:
        """Where a blob lies."""
        return self.root / "sha256" / sha256[:2] / sha256

    def bring(self, store: Store | None, files: Mapping[str, FileEntry], progress: Progress) -> None:
        """Have every blob here, checked, several at a time. The first failure stops what has not begun.

        Raises:
            ArtifactError: names the file and both digests.
            HostError: no space, or, without a store, what is missing.

        """
        wanted = {entry.sha256: (name, entry) for name, entry in files.items()}
        absent = [(name, entry) for name, entry in wanted.values() if not self.path(entry.sha256).is_file()]
        if store is None and absent:
            what = f"{len(absent)} files are not here, for example {min(absent)[0]}"
            raise HostError(what, where="offline", fix="pull this release once with a network")
        check_space(self.root, sum(entry.size - _size(self._partial(entry)) for _, entry in absent))
        meter = _Meter(progress, sum(entry.size for _, entry in wanted.values()))
        with ThreadPoolExecutor(PARALLEL, "pull") as pool:
            running = [pool.submit(self._bring_one, store, name, entry, meter) for name, entry in wanted.values()]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _bring_one(self, store: Store | None, name: str, entry: FileEntry, meter: _Meter) -> None:
        place = self.path(entry.sha256)
        lock = self.root / "locks" / f"{entry.sha256}.lock"
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                fault = difference(place, entry) if place.is_file() else "missing"
                if fault is None:
                    meter.add(entry.size)
                elif store is None:
                    raise HostError(f"{name} is damaged here: {fault}", where=str(place), fix="pull it online")
                else:
                    self._fetch(store, name, entry, meter)

    def _fetch(self, store: Store, name: str, entry: FileEntry, meter: _Meter) -> None:
        """Continue where a killed pull stopped; if that does not match in the end, start over once."""
        partial = self._partial(entry)
        resumed = _size(partial) > 0
        found = _stream(store, entry, partial, meter)
        if found != entry.sha256 and resumed:
            meter.add(-min(_size(partial), entry.size))
            partial.unlink()
            found = _stream(store, entry, partial, meter)
        if found != entry.sha256:
            partial.unlink()
            what = f"{name}: sha256 {found}, should be {entry.sha256}"
            raise ArtifactError(what, where="registry", fix="publish the artifact again")
        partial.replace(self.path(entry.sha256))
        sync_folder(partial.parent)

    def _partial(self, entry: FileEntry) -> Path:
        """A fixed name, unlike a temp name, since the next pull continues it; the lock keeps it to one writer."""
        return self.path(entry.sha256).with_suffix(".partial")


def _stream(store: Store, entry: FileEntry, partial: Path, meter: _Meter) -> str:
    """Append what `partial` lacks; returns the sha256 of the whole. Never writes more than the blob's size."""
    digest = hashlib.sha256()
    with partial.open("a+b") as file:
        file.seek(0)
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
        there = file.tell()
        meter.add(min(there, entry.size))
        with store.open_blob(entry.sha256, there) as pieces:
            for piece in pieces:
                digest.update(piece)
                there += len(piece)
                if there > entry.size:
                    break
                file.write(piece)
                meter.add(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
