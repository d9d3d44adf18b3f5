"""Save a release to one file, and load it into a registry: copies whose one side is an archive (see `stores`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.errors import ArtifactError, CorruptError, InputError
from pipeline.extras import require
from pipeline.files.atomic import check_space
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.registry.copy import (
    DEFAULTS,
    Copied,
    CopySettings,
    Request,
    Taken,
    absolute_url,
    check_registry,
    copied,
    give,
    is_there,
    take,
)
from pipeline.registry.publish import Place
from pipeline.registry.releases import Reference, parse_reference
from pipeline.stores.archive import AGAIN, ArchiveStore, header, read_archive, write_archive
from pipeline.stores.base import extras_of, open_store


def save(
    reference: str,
    file: Path,
    settings: CopySettings = DEFAULTS,
    progress: ByteProgress = no_byte_progress,
    checking: ByteProgress = no_byte_progress,
) -> Copied:
    """Save a release with all its variants and signatures to a file, complete or not at all.

    A save that was killed leaves `FILE.partial`, whose whole blobs the next save of the release keeps, after a check of
    their digests (`checking`). The policy is asked as by a pull of the reference.

    Raises:
        InputError: no such release, or `file` exists and holds something else.
        RefusedError, CorruptError: as `copy`.
        HostError: the registry is unreachable, another process writes the file, or the disk is full or read-only.

    """
    ref, place = parse_reference(reference), Place(str(file))
    require([*extras_of(ref.url), *(("sign",) if settings.policy else ())], reference)
    names = absolute_url(ref.url), file.name
    release = take(Request(open_store(ref.url), ref, place, *names, settings, (str(ref),)))
    content = release.content
    header(f"releases/{content.name}/{content.version}/manifest.json", 0, reference)  # raises if the name is too long
    if file.exists():
        _check_saved(release, file)
        return copied(release, place, [], is_there=True)
    blobs = {entry.sha256: entry.size for entry in content.files.values()}
    with write_archive(file, blobs, checking) as archive:
        missing = archive.missing(content, content.files)
        check_space(file.parent, sum(content.files[path].size for path in missing))
        return give(release, archive, place, replace(settings, dry_run=False), progress)


def load(
    file: Path, place: Place, settings: CopySettings = DEFAULTS, progress: ByteProgress = no_byte_progress
) -> Copied:  # fmt: skip
    """Copy the release in a file to a registry, as `copy` does; then set its aliases there.

    Raises:
        CorruptError: the file is truncated or damaged, or is no archive: the registry has no release of it.
        RefusedError, ArtifactError, InputError, HostError: as `copy`.

    """
    check_registry(place.url)
    require([*extras_of(place.url), *(("sign",) if settings.policy else ())], str(file))
    with read_archive(file) as archive:
        ref = _only_release(archive, file)
        request = Request(archive, ref, place, file.name, absolute_url(place.url), settings, fix=AGAIN)
        release = take(request)
        _check_complete(release, archive, file)
        return give(release, open_store(place.url), place, settings, progress)


def _check_saved(release: Taken, file: Path) -> None:
    """Reject a file that is not the whole archive of this release."""
    try:
        with read_archive(file) as archive:
            if is_there(release, archive, str(file)):
                _check_complete(release, archive, file)
                return
            what = "the file is an archive of another release; not overwritten"
    except ArtifactError as error:
        what = f"the file exists, and is not the archive of this release; not overwritten: {error.what}"
        raise InputError(what, where=str(file), fix="remove the file, or name another") from error
    raise InputError(what, where=str(file), fix="remove the file, or name another")


def _only_release(archive: ArchiveStore, file: Path) -> Reference:
    found = [Reference(str(file), name, version) for name in archive.names() for version in archive.versions(name)]
    if len(found) != 1:
        raise CorruptError(f"the archive holds {len(found)} releases, expected 1", where=str(file), fix=AGAIN)
    return found[0]


def _check_complete(release: Taken, archive: ArchiveStore, file: Path) -> None:
    """Reject an archive that lacks blobs of its release, before anything is written."""
    files = release.content.files
    if missing := archive.missing(release.content, files):
        blobs = f"{len(missing)} of {len({entry.sha256 for entry in files.values()})} blobs"
        what = f"{blobs} are missing or have another size, for example {missing[0]}"
        raise CorruptError(what, where=str(file), fix=AGAIN)
