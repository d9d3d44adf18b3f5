"""How a release came into a registry: the records beside it, read and compared. Their text: `stores/promotions.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from pipeline.errors import CorruptError, no_string
from pipeline.stores.base import Content, Signature, Store, open_store
from pipeline.stores.promotions import PROMOTED, Promotion, promotions_of

PARALLEL = 8
"""Releases that are read at a time."""


def read_promotions(store: Store, name: str, version: str, document: bytes, where: str) -> tuple[Promotion, ...]:
    """Return the copies that brought a release into a registry, the oldest first; none if it was published there.

    `where` names the release in errors.

    Raises:
        CorruptError: a record is damaged.

    """
    sha256 = hashlib.sha256(document).hexdigest()
    records = [promotions_of(data, sha256, where) for data in store.signatures(name, version, PROMOTED, sha256)]
    records.sort(key=lambda record: record[-1].when)
    return tuple(dict.fromkeys(promotion for record in records for promotion in record))


def promotions_by_version(url: str, name: str, versions: Iterable[str]) -> dict[str, tuple[Promotion, ...]]:
    """Return the copies that brought releases of a name into a registry, by version; none of a damaged record.

    Raises:
        HostError: the registry cannot be reached.

    """
    no_string(versions, "versions", "versions")
    store = open_store(url)

    def copies(version: str) -> tuple[Promotion, ...]:
        document = store.read_release(name, version)
        with suppress(CorruptError):
            return () if document is None else read_promotions(store, name, version, document, f"{name}@{version}")
        return ()

    found = sorted(set(versions))
    with ThreadPoolExecutor(PARALLEL, "look") as pool:
        return dict(zip(found, pool.map(copies, found), strict=True))


def unrecorded(store: Store, content: Content) -> Content:
    """Return a new release without its record, if a copy that was killed left the same record in the store.

    Times and runs may differ: the first attempt is the one that is recorded.
    """
    kept = [each for each in content.signatures if each.path != PROMOTED or not _is_recorded(store, content, each)]
    return replace(content, signatures=tuple(kept))


def _is_recorded(store: Store, content: Content, record: Signature) -> bool:
    sha256 = record.manifest_sha256
    found = store.signatures(content.name, content.version, PROMOTED, sha256)
    return _facts(record.data, sha256) in [_facts(data, sha256) for data in found]


def _facts(data: bytes, sha256: str) -> list[Promotion]:
    """Return the promotions of a record without their times and runs; none of a damaged record."""
    with suppress(CorruptError):
        return [replace(each, when="", run="") for each in promotions_of(data, sha256, "")]
    return []
