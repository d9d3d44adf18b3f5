"""Commands on the cache of compiled graphs, local and shared: cache push, pull, stats, gc."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.cache.collect import DAY_S, NONE, Unused, collect, entry_stats, folder_sizes, remove_unused
from pipeline.cache.local import Cache, Kind, Stats, default_root
from pipeline.cache.remote import SHARED, STORED, Remote, RemoteCache, gc, pull_all, push_all
from pipeline.cli.console import Console
from pipeline.cli.groups import Group
from pipeline.cli.options import as_json
from pipeline.cli.results import print_json, print_line, print_result, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import counted, size
from pipeline.errors import HostError, InputError
from pipeline.stores.base import check_exists

if TYPE_CHECKING:
    from pipeline.recipe.backend_settings import BackendSettings

GIB = 1 << 30
KINDS = {
    "graphs": "compiled graphs of all builds",
    "memos": "from a graph's inputs to its key",
    "subgraphs": "object files that graphs share",
    "goldens": "reference outputs of the gates",
    "files": "weights and artifacts for nodes of a cluster",
}

shared = click.argument("url", envvar="TANDEM_REMOTE_CACHE")
remote_option = click.option("--remote", "url", help="URL of a shared cache (default: the local cache).")


@click.group(cls=Group)
def cache() -> None:
    """Manage the local and the shared cache of compiled graphs."""


@cache.command("push")
@shared
@as_json
@click.pass_obj
def cache_push(console: Console, url: str, json_: bool) -> None:
    """Push compiled graphs, and the subgraphs that they share, to the shared cache at URL."""
    remote = Remote(url, "write")
    counts = {kind: push_all(Cache(default_root(), kind), remote.open(kind, console.log)) for kind in SHARED}
    is_empty = not any(Cache(default_root(), kind).entries() for kind in SHARED)
    nothing = f": the local cache {default_root()} has no graphs" if is_empty else ": none is new"
    line = f"pushed {_counted(counts)} to {url}{'' if any(counts.values()) else nothing}"
    print_result({"pushed": counts["graphs"], "kinds": counts}, line, as_json=json_)


@cache.command("pull")
@shared
@click.option("--backend", type=click.Choice(["inductor", "neuron"]),
              help="Pull graphs of this backend only (default: every backend that is installed).")  # fmt: skip
@as_json
@click.pass_obj
def cache_pull(console: Console, url: str, backend: str | None, json_: bool) -> None:
    """Pull the graphs and subgraphs that this machine's toolchains can use from the shared cache at URL."""
    check_exists(url)
    remotes = {kind: Remote(url).open(kind, console.log) for kind in SHARED}
    pulled = []
    for toolchain in _toolchains(backend):
        counts = {kind: pull_all(Cache(default_root(), kind), of, toolchain) for kind, of in remotes.items()}
        pulled.append((toolchain, counts))
    data = {
        "pulled": sum(counts["graphs"] for _, counts in pulled),
        "toolchains": [{"toolchain": of, "pulled": counts["graphs"], "kinds": counts} for of, counts in pulled],
    }
    lines = [
        f"{_shown(toolchain)}: pulled {_counted(counts)} from {url}{'' if any(counts.values()) else ': none is new'}"
        for toolchain, counts in pulled
    ]
    print_result(data, "\n".join(lines), as_json=json_)


def _counted(counts: Mapping[Kind, int]) -> str:
    return " and ".join(counted(count, kind[:-1]) for kind, count in counts.items())


def _toolchains(name: str | None) -> list[dict[str, str]]:
    """Return the toolchains here whose graphs can be pulled: of backend `name`, or of every backend.

    Raises:
        HostError: none is installed.

    """
    from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings  # doubles the time of `cache stats`

    # The chip is in a graph's flags, not in its toolchain.
    known = (InductorSettings(), InductorSettings(device="cuda"), NeuronSettings(name="neuron", target="trn2"))
    toolchains, faults = [], []
    for settings in known:
        if name in (None, settings.name):
            try:
                toolchains.append(_toolchain(settings))
            except HostError as error:
                faults.append(error)
    if not toolchains:
        raise faults[0]
    return toolchains


def _toolchain(settings: BackendSettings) -> dict[str, str]:
    from pipeline.backends.base import make_backend  # doubles the time of `cache stats`

    backend = make_backend(settings)
    for problem in backend.preflight():
        if problem.where != "environment":  # variables are no part of a toolchain
            fix = f"`tandem doctor --backend {settings.name}` lists every problem"
            raise HostError(problem.what, where=f"backend {settings.name}", fix=fix)
    return backend.toolchain().as_dict()


def _shown(toolchain: Mapping[str, str]) -> str:
    """Return a toolchain in one line: the backend, then its versions."""
    versions = ", ".join(f"{name} {version}" for name, version in toolchain.items() if name != "backend")
    return f"{toolchain['backend']} ({versions})"


@cache.command()
@remote_option
@as_json
def stats(url: str | None, json_: bool) -> None:
    """Show number and size of the entries by kind, and the size of each folder of the local cache."""
    kinds, place = _stored(url), url or default_root()
    folders = {} if url else folder_sizes(default_root())
    if json_:
        print_json(_data(kinds) | {"root": place, "folders": folders})
        return
    print_line(f"{place}\n")
    rows = [(f"{kind}: {KINDS[kind]}", f"{of.entries:,}", size(of.size_bytes)) for kind, of in kinds.items()]
    print_table(Table(("entries", "number", "size"), rows, right=("number", "size")))
    if folders:
        print_line("")
        sizes = [(name, size(size_bytes)) for name, size_bytes in (folders | {"total": sum(folders.values())}).items()]
        print_table(Table(("folder, with locks and records", "size"), sizes, right=("size",)))


def _limit(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # click's range accepts nan
        raise click.BadParameter("nan is not a number")
    return value


LIMIT = click.FloatRange(0, 1e6)


@cache.command("gc")
@click.option(
    "--max-gib",
    type=LIMIT,
    callback=_limit,
    help="Maximum size of graphs, subgraphs, memos, goldens and files together; the oldest are removed first "
    "(default: no limit; needs --max-days).",
)
@click.option("--max-days", type=LIMIT, callback=_limit,
              help="Maximum age in days; in the local cache, days since the last use. Blobs and shards younger than "
                   "one day always stay.")  # fmt: skip
@remote_option
@as_json
def cache_gc(max_gib: float | None, max_days: float | None, url: str | None, json_: bool) -> None:
    """Remove the oldest entries. At least one of --max-gib and --max-days is needed.

    With --max-days, pulled blobs and weight shards of the local cache that no artifact on this machine uses are removed
    as well. Those used within the last day stay, also with `--max-days 0`: a pull or a build may need them. Text from
    `tandem distill` and downloaded sources are never removed.
    """
    if max_gib is None and max_days is None:
        raise InputError("no limit given", where="cache gc", fix="add --max-gib, --max-days or both")
    age_s = None if max_days is None else max_days * DAY_S
    max_bytes = None if max_gib is None else int(max_gib * GIB)
    removed = gc(_open(url), max_bytes, age_s) if url else collect(default_root(), max_bytes, age_s)
    unused = None if url or age_s is None else remove_unused(default_root(), age_s)
    kept = _stored(url)
    parts = [f"{counted(of.entries, kind[:-1])}, {size(of.size_bytes)}" for kind, of in removed.items()]
    if unused is not None:
        parts.append(_blobs(unused.removed, "unused "))
    left = f"; kept {counted(_total(kept).entries, 'entry', 'entries')}, {size(_total(kept).size_bytes)}"
    left += _unremoved(unused or Unused(), max_days or 0)
    others = {} if url else {name: of for name, of in folder_sizes(default_root()).items() if name not in kept and of}
    if others and max_gib is not None:
        left += f"; not limited by --max-gib: {', '.join(f'{name} {size(of)}' for name, of in others.items())}"
    data = _data(removed) | {"unused": asdict(unused.removed if unused else NONE), "kept": _data(kept)}
    if unused is not None:
        data["unused_kept"] = {"newer": asdict(unused.newer), "linked": asdict(unused.linked)}
    print_result(data, f"removed {'; '.join(parts)}{left}", as_json=json_)


def _blobs(of: Stats, which: str = "") -> str:
    return f"{counted(of.entries, f'{which}blob or shard', f'{which}blobs and shards')}, {size(of.size_bytes)}"


def _unremoved(unused: Unused, max_days: float) -> str:
    """Return why blobs and shards of the local cache stay; empty if none do."""
    newer = "one day" if max_days <= 1 else f"{max_days:g} days"
    reasons = {f"younger than {newer}": unused.newer, "used by artifacts on this machine": unused.linked}
    return "".join(f"; kept {_blobs(of)}: {reason}" for reason, of in reasons.items() if of.entries)


def _open(url: str) -> list[RemoteCache]:
    check_exists(url)
    return [Remote(url, "write").open(kind) for kind in STORED]


def _stored(url: str | None) -> Mapping[Kind, Stats]:
    return {of.kind: of.stats() for of in _open(url)} if url else entry_stats(default_root())


def _data(kinds: Mapping[Kind, Stats]) -> dict[str, Any]:
    """Return the counts of all entries, then those of every kind."""
    return asdict(_total(kinds)) | {"kinds": {kind: asdict(stats) for kind, stats in kinds.items()}}


def _total(kinds: Mapping[Kind, Stats]) -> Stats:
    return sum(kinds.values(), Stats(0, 0))
