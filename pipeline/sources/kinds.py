"""The kinds of source by scheme, and what depends on the kind alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import SourceError, TandemError
from pipeline.progress import Progress
from pipeline.sources import folder, hub, package, pico, s3
from pipeline.sources.base import Fetched, SourceKind

KINDS: Mapping[str, SourceKind] = {"": folder, "hf": hub, "s3": s3, "package": package, "pico": pico}
"""Scheme of a source -> the module of its kind; a folder has no scheme."""

REVISION_TIMEOUT_S = 5.0


def fetch(source: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the folder of a source, downloaded or converted if it is not on this host yet.

    Raises:
        SourceError: an unknown scheme, or as the kind's own `fetch`; HostError: no network, no space.

    """
    kind, location = _kind_of(source)
    return kind.fetch(location, base=base, cache=cache, progress=progress)


def moving(source: str) -> bool:
    """Return whether the content of a source may change while its text and the files on this host stay the same."""
    kind, location = _kind_of(source)
    return kind.moving(location)


def current_revision(source: str, *, timeout_s: float = REVISION_TIMEOUT_S) -> str | None:
    """Return the revision that a moving source names now, with one request.

    None if the source does not move, or the revision cannot be determined: no network, no access.
    """
    kind, location = _kind_of(source)
    try:
        return kind.current_revision(location, timeout_s=timeout_s) if kind.moving(location) else None
    except TandemError:
        return None


def _kind_of(source: str) -> tuple[SourceKind, str]:
    """Return the kind of a source, and its location without the scheme."""
    scheme, separator, location = source.partition("://")
    if not separator:
        return KINDS[""], source
    if scheme not in KINDS or not scheme:
        fix = f"use a folder, or one of {', '.join(f'{name}://' for name in KINDS if name)}"
        raise SourceError(f"unsupported kind of source: {scheme}://", where=source, fix=fix)
    return KINDS[scheme], location
