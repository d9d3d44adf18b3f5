"""Release -> verified artifact directory. Blobs already pulled are hard-linked; a killed pull continues. No torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifact import MANIFEST, FileEntry, Manifest
from pipeline.cache import default_root
from pipeline.errors import ArtifactError, InputError
from pipeline.files import atomic_dir, digest_file, link_or_copy, safe_relative, write_atomic
from pipeline.stores.base import Store, open_store

PARALLEL = 8
Progress = Callable[[int, int], None]


def pull(
    reference: str, directory: Path | None = None, *, cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:  # fmt: skip
    """Pull `REGISTRY/NAME@VERSION-or-ALIAS` into `directory` (default `artifacts/pulled/<name>`), complete or not at all.

    Raises:
        InputError: no such release or alias.
        ArtifactError: a blob that does not match its digest, or an unsafe path.
    """
    url, name, wanted = _split(reference)
    store = open_store(url)
    version = store.get_alias(name, wanted) or wanted
    data = store.get_manifest(name, version)
    if data is None:
        known = ", ".join(store.versions(name)) or "none"
        raise InputError(f"no version or alias {wanted!r} of {name}", where=url, fix=f"published: {known}")
    manifest = _parse(data, reference)
    blobs = (cache or default_root()) / "blobs"
    out = directory or Path("artifacts/pulled") / name
    _fetch_all(store, manifest, blobs, progress)
    with atomic_dir(out) as folder:
        for path, entry in manifest.files.items():
            link_or_copy(blobs / entry.sha256, folder / safe_relative(path, reference))
        write_atomic(folder / MANIFEST, data)
    return out


def _split(reference: str) -> tuple[str, str, str]:
    place, _, version = reference.rpartition("@")
    url, _, name = place.rpartition("/")
    if not (url and name and version):
        raise InputError(
            f"{reference!r} is not REGISTRY/NAME@VERSION", where="pull", fix="for example artifacts/registry/pico-spec@latest"
        )
    return url, name, version


def _parse(data: bytes, where: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ArtifactError(f"unreadable manifest: {error.errors()[0]['msg']}", where=where, fix="publish again") from error
    for name in manifest.files:
        safe_relative(name, where)
    return manifest


def _fetch_all(store: Store, manifest: Manifest, blobs: Path, progress: Progress) -> None:
    """Bring every blob that is not here, several at a time; what is here is checked, not trusted."""
    entries = {entry.sha256: entry for entry in manifest.files.values()}
    total, done = sum(entry.size for entry in entries.values()), 0

    def fetch(entry: FileEntry) -> int:
        place = blobs / entry.sha256
        if not (place.is_file() and digest_file(place).sha256 == entry.sha256):
            store.get_blob(entry.sha256, place)
        return entry.size

    with ThreadPoolExecutor(PARALLEL) as pool:
        for size in pool.map(fetch, entries.values()):
            done += size
            progress(done, total)


