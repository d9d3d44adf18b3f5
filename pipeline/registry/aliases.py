"""Aliases of a registry's releases: set, move, read the history, roll back. Releases themselves: see `releases.py`."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.registry.releases import check_usable, find_release, no_releases, target_of
from pipeline.stores.base import Alias, Interrupted, Move, Store, open_store
from pipeline.stores.objects import NAME

SWAPS = 8
"""Attempts at moving an alias while other processes move it."""


def check_name(alias: str, where: str) -> None:
    """Reject an alias that is not a plain name; `where` names the option or argument.

    Raises:
        InputError: other characters than those of names.

    """
    if not NAME.fullmatch(alias):
        fix = "use letters, digits, . _ + -, first a letter or digit, for example prod"
        raise InputError(f"malformed alias: {alias!r}", where=where, fix=fix)


def set_alias(url: str, release: str, alias: str) -> str:
    """Point an alias at a published `name@version`, or at what another alias of the name points at.

    Returns the version.

    Raises:
        InputError: no such release, or the alias is malformed or named like one.

    """
    check_name(alias, "alias")
    name, _, wanted = release.partition("@")
    store = open_store(url)
    version, _ = find_release(store, name, wanted, url)
    check_alias(store, name, version, alias, url)
    with store.publishing():
        move_alias(store, name, alias, version, url)
    return version


def check_alias(store: Store, name: str, version: str, alias: str, url: str) -> None:
    """Reject an alias that has a version's name: a version takes precedence, so the alias could never be read.

    Raises:
        InputError: a version has this name. RefusedError: the release was yanked.

    """
    if alias == version or store.read_release(name, alias) is not None:
        raise InputError(f"alias {alias!r} is a version of {name}", where=url, fix="choose another name")
    check_usable(store, name, version, url, "use another version")


def move_alias(store: Store, name: str, alias: str, version: str, url: str) -> None:
    """Point an alias at a version; concurrent moves by other processes are kept in its history.

    A client may repeat a request that was carried out; the repeated one is refused. Then the history has this move, and
    is left as it is: a second move would undo one that another process made in between.

    Raises:
        ArtifactError: other processes keep moving it.

    """
    sent: list[tuple[Move, tuple[Move, ...]]] = []  # with the moves before
    for _ in range(SWAPS):
        now = store.read_alias(name, alias)
        known = () if now is None else now.moves
        if (now is not None and now.version == version) or any(_has_more(known, of, move) for move, of in sent):
            return
        sent.append((this_move(version), known))
        if store.swap_alias(name, alias, sent[-1][0], now):
            return
    what = f"alias {alias!r} is being moved by other processes"
    raise ArtifactError(what, where=f"{url}/{name}", fix="try again")


def list_aliases(url: str, name: str) -> dict[str, str]:
    """Return the aliases of a name and their versions; an empty version means a damaged alias.

    Raises:
        InputError: the name has no releases.

    """
    store = open_store(url)
    aliases = store.aliases(name)
    if not aliases and not store.versions(name):
        raise no_releases(url, name)
    return aliases


def history(url: str, name: str, alias: str) -> Alias:
    """Return where an alias points, and its moves, the newest first.

    Raises:
        InputError: no such alias; lists those that exist.
        ArtifactError: the alias is damaged.

    """
    store = open_store(url)
    current = store.read_alias(name, alias)
    if current is None:
        if not store.versions(name):
            raise no_releases(url, name)
        known = ", ".join(store.aliases(name)) or "none"
        raise InputError(f"{name!r} has no alias {alias!r}", where=url, fix=f"aliases of {name!r}: {known}")
    target_of(current, alias, f"{url}/{name}")
    return current


def roll_back(url: str, name: str, alias: str, leave: str | None = None) -> tuple[str, str]:
    """Point an alias at its previous release; returns versions from and to. Twice goes two releases back.

    With `leave`, the version that the alias is to leave, a repeated call changes nothing.

    Raises:
        InputError: no previous release, or it is not published any more; the alias points at another than `leave`.
        ArtifactError: another process moved the alias at the same time.
        RefusedError: the previous release was yanked.
        HostError: the registry cannot be reached; whether the alias was moved is unknown.

    """
    now = history(url, name, alias)
    if leave is not None and now.version != leave:
        return _already_left(now, leave, f"{url}/{name}@{alias}")
    before = previous_version(now)
    store = open_store(url)
    if before is None or store.read_release(name, before) is None:
        what = _oldest(now, alias) if before is None else f"{before} is not published"
        raise InputError(what, where=f"{url}/{name}", fix=f"tandem alias set {url}/{name}@VERSION {alias}")
    check_usable(store, name, before, f"{url}/{name}", f"tandem alias set {url}/{name}@VERSION {alias}")
    with store.publishing():
        if not _swapped(store, Moved(url, name, alias, now), this_move(before)):
            what = f"alias {alias!r} was moved by another process; not rolled back"
            raise ArtifactError(what, where=f"{url}/{name}", fix=f"tandem alias history {url}/{name}@{alias}")
    return now.version, before


@dataclass(frozen=True)
class Moved:
    """An alias that is moved, and where it points before."""

    url: str
    name: str
    alias: str
    now: Alias


def _swapped(store: Store, of: Moved, move: Move) -> bool:
    """Move an alias; if the answer is lost or negative, read whether the history has this move.

    Raises:
        HostError: the registry cannot be reached.

    """
    try:
        if store.swap_alias(of.name, of.alias, move, of.now):
            return True
        lost = None  # False also if a client repeated a request that was carried out: the first attempt moved the alias
    except Interrupted as error:
        lost = error
    try:
        current = store.read_alias(of.name, of.alias)
    except HostError as error:
        what = f"{error.what}; whether alias {of.alias!r} was moved is unknown"
        fix = f"tandem alias rollback {of.url}/{of.name}@{of.alias} --from {of.now.version}"
        raise HostError(what, where=of.url, fix=fix) from error
    is_mine = current is not None and _has_more(current.moves, of.now.moves, move)
    if lost is not None and not is_mine:
        raise lost
    return is_mine


def _has_more(moves: Sequence[Move], before: Sequence[Move], move: Move) -> bool:
    """Return whether a move was added; an equal one of the same second may have been there."""
    return moves.count(move) > before.count(move)


def _already_left(now: Alias, leave: str, where: str) -> tuple[str, str]:
    """Return the versions of a rollback that was done before.

    Raises:
        InputError: another command moved the alias.

    """
    if len(now.moves) > 1 and now.moves[1].version == leave:
        earlier = Alias(leave, now.token, now.moves[1:])
        if previous_version(earlier) == now.version:
            return leave, now.version
    raise InputError(f"points at {now.version}, not at {leave}", where=where, fix=f"tandem alias history {where}")


def _oldest(now: Alias, alias: str) -> str:
    """Return why an alias has no earlier release; releases that a rollback left are later ones."""
    later = dict.fromkeys(move.version for move in now.moves if move.version != now.version)
    if not later:
        return f"alias {alias!r} has pointed at {now.version} only"
    return f"alias {alias!r} points at its first release {now.version}; it was moved back from {', '.join(later)}"


def previous_version(now: Alias) -> str | None:
    """Return the release before the one that an alias points at; rollbacks undo moves, as in a stack."""
    stack: list[str] = []
    for move in reversed(now.moves):
        if len(stack) > 1 and stack[-2] == move.version:
            stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack[-2] if len(stack) > 1 else None


def this_move(version: str) -> Move:
    """Return a move at the present time by the user, or the workflow's actor, of this process."""
    who = os.environ.get("GITHUB_ACTOR") or os.environ.get("USER") or _user()
    return Move(version, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "".join(c for c in who if c.isprintable()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
