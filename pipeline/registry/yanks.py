"""Yanked releases: visible, rejected by aliases and by pulls, never deleted. And retention, which removes old files.

A retired release is a yanked one without its files: its manifest stays, so that its version is never used again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.registry.aliases import previous_version, this_move
from pipeline.registry.release import parse_document
from pipeline.registry.releases import find_release, parse_reference
from pipeline.stores.base import Store, Yank, check_exists, open_store, scheme_of

DAY_S = 24 * 3600.0
KEEPS_FILES = {
    "hf": "a Hub keeps the files of all commits",
    "oci": "an OCI registry keeps the files of all tags",
}
"""Kind of registry whose files no rule removes -> why."""
STAMP = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Retention:
    """Which releases of a name keep their files: the newest `keep_last`, and those younger than `keep_days`.

    Versions built in the same second are kept together. Those that an alias points at, or would be rolled back to, and
    yanked ones keep them always. None: no such rule.
    """

    keep_last: int | None = None
    keep_days: float | None = None


def yank(reference: str, reason: str) -> Yank:
    """Yank a release by its version: pulls and aliases reject it from now on. Returns the record.

    A yank is not undone, and a second one changes nothing: the first record is returned.

    Raises:
        InputError: no such version, an alias in place of a version, or an empty reason.

    """
    if not reason.strip():
        raise InputError("empty", where="--reason", fix="say why the release must not be used, and what to use")
    ref = parse_reference(reference)
    store = open_store(ref.url)
    version, _ = find_release(store, ref.name, ref.wanted, ref.url)
    if version != ref.wanted:
        what = f"{ref.wanted} is an alias, which may move"
        raise InputError(what, where=str(ref), fix=f"name the version: {ref.url}/{ref.name}@{version}")
    record = _record(reason.strip())
    with store.publishing():
        store.yank(ref.name, version, record)
    return store.read_yank(ref.name, version) or record


def retire(url: str, rule: Retention, *, dry_run: bool = False) -> list[str]:
    """Retire the releases that a retention rule does not keep; return them as `name@version`. `gc` removes their files.

    Raises:
        InputError: no such registry, or a kind that keeps the files of its releases: a Hub, an OCI registry.
        ArtifactError: a release cannot be read: nothing is retired.

    """
    check_exists(url)
    if (kept := KEEPS_FILES.get(scheme_of(url)[0])) is not None:
        raise InputError(kept, where=url, fix="omit the retention rule")
    store = open_store(url)
    old = [(name, version) for name in store.names() for version in _old(store, name, rule, url)]
    if old and not dry_run:
        with store.publishing():
            for name, version in old:
                if version not in _pointed_at(store, name):  # an alias may have moved since
                    store.yank(name, version, _record(_words(rule), retired=True))
    return [f"{name}@{version}" for name, version in old]


def _old(store: Store, name: str, rule: Retention, url: str) -> list[str]:
    """Return the versions of a name that a rule does not keep, the oldest first."""
    built = {version: _created(store, name, version, url) for version in store.versions(name)}
    order = sorted(built, key=lambda version: built[version])
    newest = order if rule.keep_last is None else _newest(built, rule.keep_last)
    before = time.strftime(STAMP, time.gmtime(time.time() - (rule.keep_days or 0.0) * DAY_S))
    used = _pointed_at(store, name)
    return [
        version
        for version in order
        if (rule.keep_last is None or version not in newest)
        and (rule.keep_days is None or built[version] < before)
        and version not in used
        and store.read_yank(name, version) is None
    ]


def _newest(built: Mapping[str, str], count: int) -> Collection[str]:
    """Return the newest `count` versions, and those of the same second as the oldest of them."""
    times = sorted(built.values(), reverse=True)[:count]
    return {version for version, when in built.items() if when >= times[-1]}


def _created(store: Store, name: str, version: str, url: str) -> str:
    return parse_document(store.read_release(name, version) or b"", f"{url}/{name}@{version}").created


def _pointed_at(store: Store, name: str) -> Collection[str]:
    """Return the versions that aliases point at, and those that a rollback of each would point at."""
    aliases = [store.read_alias(name, alias) for alias in store.aliases(name)]
    return {version for each in aliases if each for version in (each.version, previous_version(each)) if version}


def _record(reason: str, *, retired: bool = False) -> Yank:
    move = this_move("")
    return Yank(reason, move.when, move.who, retired)


def _words(rule: Retention) -> str:
    last = [] if rule.keep_last is None else [f"--keep-last {rule.keep_last}"]
    days = [] if rule.keep_days is None else [f"--keep-days {rule.keep_days:g}"]
    return f"retired by `tandem gc {' '.join([*last, *days])}`: its files were removed"
