"""Compile caches of vLLM's newer Neuron plugin, an artifact kind of their own: packed, and installed for vLLM to read.

    neuron/compile_cache/<key>/   a graph: graph.hlo (or module.mlir) graph_<key>.neff .artifact_metadata_v0.json
                                  .compilation_complete
    neuron/compile_cache/nki/     kernels
    manifest.json                 versions, flags, chip, keys, and the arguments and environment of the server that
                                  filled it

The layout is that of the plugin's sources (vllm_neuron 0.21: compile/{cache,backend,schema,parallel_compile}.py and
nki/nki_cache.py). A key names a graph, its shapes, versions and flags; a graph with another key is a miss, which is an
error in the environment that `install` prints. Compiles nothing, runs nothing, opens no NEFF. Imports no torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from pipeline.artifact.manifest import (
    CACHE_KIND,
    MANIFEST,
    CacheBackend,
    CacheManifest,
    FileEntry,
    content_digest,
    dump,
)
from pipeline.artifact.verify import check_host, check_replaceable, difference, verify
from pipeline.backends.neuron.support import PLACEHOLDERS
from pipeline.errors import ArtifactError, InputError, no_string
from pipeline.files.atomic import atomic_dir, check_space, create_only, digest_file
from pipeline.nxdi.vllm_args import VARIABLE, shell_line
from pipeline.nxdi.vllm_cache_layout import KEY, NKI, OF_ONE_SERVER, Route, entries, entry_faults, listing, route_of
from pipeline.registry.release import VERSION_LENGTH

CACHE_FOLDER = PurePosixPath("neuron/compile_cache")
"""The plugin's cache under VLLM_CACHE_ROOT."""

ROOT = "VLLM_CACHE_ROOT"
COMMAND = "command.txt"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SHOWN = 6
NEVER_COMPILE = {
    "VLLM_NEURON_DISABLE_WARMUP_COMPILE": "1",
    "VLLM_NEURON_DISABLE_GRAPH_CAPTURE_BACKEND": "1",
    "NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND": "1",
}
"""A miss is an error, and graphs are not captured, because captured graphs ignore the first switch. The second switch
has two names: one in the sources of 0.21, one in AWS's documents of 0.24."""

ROUTE = "VLLM_NEURON_BACKEND"
NATIVE = ("neuron_native", "neuron")
"""Values of `ROUTE` that select the native route; other values select the XLA route."""

CONTRADICTIONS = ("VLLM_NEURON_DISABLE_COMPILE_CACHE", "NEURON_LIBTORCH_DISABLE_COMPILE_CACHE", ROOT, *NEVER_COMPILE)
PACKAGES = ("vllm", "vllm-neuron", "libtorch-neuronx-lite", "torch-neuronx", "neuronx-cc", "nki")
NEEDED = ("vllm-neuron", "neuronx-cc")
OWN_OPTIONS = ("--framework", "--target", "--output", "--logfile")
"""Options that the plugin itself gives the compiler; the rest of a command are flags."""


@dataclass(frozen=True)
class ServerRun:
    """The server that filled a cache: its arguments and variables, and versions that differ from those installed.

    `expects`: keys of the graphs that it looks up (empty: all graphs of the cache).
    """

    serve: Sequence[str]
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    expects: Sequence[str] = ()

    def __post_init__(self) -> None:
        no_string(self.serve, "serve", "arguments")
        no_string(self.expects, "expects", "keys")


@dataclass(frozen=True)
class Installation:
    """An installed cache, and the command of a server on it. `unchecked` packages are not installed on this host."""

    cache_root: str
    environment: Mapping[str, str]
    command: tuple[str, ...]
    added: int
    kept: int
    unchecked: tuple[str, ...]

    def shell(self) -> str:
        """Return the command as one line for a shell."""
        return shell_line(self.environment, self.command)


def installed_versions() -> dict[str, str]:
    """Return the versions of this host's packages that decide a key or trace the graph."""
    versions = {}
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version != PLACEHOLDERS.get(name):
            versions[name] = version
    return versions


def pack(source: Path, out: Path, name: str, run: ServerRun) -> CacheManifest:
    """Make an artifact of a cache folder, or of the VLLM_CACHE_ROOT above it.

    Raises:
        InputError: no cache, another layout, an incomplete entry, a missing fact, or `out` is not an artifact.
        HostError: no space, read-only or forbidden.

    """
    cache = source / CACHE_FOLDER if (source / CACHE_FOLDER).is_dir() else source
    if not cache.is_dir():
        fix = "use the VLLM_CACHE_ROOT of the server that filled the cache"
        raise InputError("no such folder", where=str(cache), fix=fix)
    keys, faults = entries(cache, only=run.expects)
    faults += absent(run.expects, keys, "the cache")
    if faults:
        fix = "let the server finish its warm-up, then stop it; remove incomplete entries"
        raise InputError(shown(faults), where=str(cache), fix=fix)
    check_replaceable(out)
    toolchain = {"backend": CACHE_KIND, **_versions(run.versions)}
    facts = _facts(cache, keys, run)
    names = [path for top in (*keys, NKI) for path in listing(cache, top)]
    check_space(out, sum((cache / path).stat().st_size for path in names))
    with atomic_dir(out) as folder:
        files = {}
        for path in names:
            _copy(cache / path, folder / CACHE_FOLDER / path)
            digest = digest_file(folder / CACHE_FOLDER / path)
            files[str(CACHE_FOLDER / path)] = FileEntry(sha256=digest.sha256, size=digest.size)
        if late := [fault for key in keys for fault in entry_faults(folder / CACHE_FOLDER / key)]:
            raise InputError(f"files changed during packing: {shown(late)}", where=str(cache), fix="stop the server")
        manifest = CacheManifest(
            name=_checked_name(name), version="unversioned", created=_now(), toolchain=toolchain, backend=facts,
            tensor=_tensor(run.serve), files=files,
            requires={"device": "neuron", "chip": facts.target},
        )  # fmt: skip
        manifest = manifest.model_copy(update={"version": content_digest(manifest)[:VERSION_LENGTH]})
        (folder / MANIFEST).write_bytes(dump(manifest))
    return manifest


def install(root: Path, cache_root: Path, *, host: Mapping[str, str], versions: Mapping[str, str]) -> Installation:
    """Copy a verified cache to where vLLM reads it, entry by entry; no entry replaces another.

    `host` is the result of `host_facts`. On a host without a Neuron device the chip is not checked; packages that
    `versions` lacks are not checked either. After a kill all entries are complete, and the next call adds the rest.

    Raises:
        InputError: an artifact of another kind.
        ArtifactError: it does not verify, is incomplete, is for another host, or differs from an installed entry.
        HostError: no space, read-only or forbidden.

    """
    manifest, base, folder = verify(root).manifest, cache_root.absolute(), cache_root.absolute() / CACHE_FOLDER
    if not isinstance(manifest, CacheManifest):
        raise InputError("not a compile cache", where=str(root), fix=f"show its kind: tandem inspect {root}")
    facts, keys = _read(manifest, root)
    check_same_host(manifest, host, versions)
    new = _new(manifest, folder)
    check_space(folder, sum(entry.size for name, entry in manifest.files.items() if name.split("/")[2] in new))
    for key in [key for key in keys if key in new]:
        with atomic_dir(folder / key, replace=False, aside=base) as work:
            for name in _of(manifest, key):
                _copy(root / name, work / Path(name).relative_to(CACHE_FOLDER / key))
    if NKI in new:
        for name in _of(manifest, NKI):
            created = create_only(base / name, (root / name).read_bytes())
            if not created and difference(base / name, manifest.files[name]):
                raise _occupied([f"{name}: created by another process"], folder)
    added = len(new - {NKI})
    environment = {**facts.environment, ROOT: str(base), **NEVER_COMPILE}
    unchecked = tuple(name for name in manifest.toolchain if name != "backend" and name not in versions)
    return Installation(str(base), environment, ("vllm", "serve", *facts.serve), added, len(keys) - added, unchecked)


def absent(expects: Sequence[str], found: Sequence[str], where: str) -> list[str]:
    """Return what says which expected keys are not among those found; empty if all are."""
    no_string(expects, "expects", "keys")
    no_string(found, "found", "keys")
    if not (keys := sorted(set(expects) - set(found))):
        return []
    return [f"{where} lacks {len(keys)} of {len(set(expects))} graphs: {shown(keys, ', ')}"]


def _facts(cache: Path, keys: Sequence[str], run: ServerRun) -> CacheBackend:
    """Return the manifest's facts; chip and flags are in the commands that the plugin left in its entries."""
    commands = [command for key in keys if (command := _command(cache / key / COMMAND))]
    targets = {command.target for command in commands}
    if len(targets) != 1:
        what = f"the entries are for {', '.join(sorted(targets)) or 'an unknown chip'}"
        fix = f"pack an unmodified cache of one chip; {COMMAND} in each entry names the chip"
        raise InputError(what, where=str(cache), fix=fix)
    for name in run.environment:
        if not VARIABLE.fullmatch(name) or name in CONTRADICTIONS:
            what = f"invalid variable for a server on this cache: {name!r}"
            raise InputError(what, where="--env", fix=f"remove {name}; install sets the cache's variables")
    return CacheBackend(
        target=targets.pop(), flags=tuple(sorted({command.flags for command in commands})),
        serve=tuple(run.serve), environment=dict(run.environment), keys=len(keys),
        route=_route(cache, keys, run.environment), expects=tuple(keys),
    )  # fmt: skip


def _route(cache: Path, keys: Sequence[str], environment: Mapping[str, str]) -> Route:
    """Return the route that lowered all graphs: a server looks up graphs of one route."""
    routes = sorted({route for key in keys if (route := route_of(cache / key))})
    if len(routes) != 1:
        fix = "pack a cache that one server filled, or name its graphs with --expect"
        raise InputError(f"the entries are of {len(routes)} routes: {', '.join(routes)}", where=str(cache), fix=fix)
    value = environment.get(ROUTE)
    if value is not None and (value in NATIVE) != (routes[0] == "native"):
        what = f"{ROUTE}={value} contradicts the entries, which are of the {routes[0]} route"
        raise InputError(what, where="--env", fix=f"pass the value of {ROUTE} of the server that filled the cache")
    return routes[0]


@dataclass(frozen=True)
class _Command:
    """A compiler's command: the chip, and its flags as one text."""

    target: str
    flags: str


def _command(path: Path) -> _Command | None:
    """Return the command in a file: `neuronx-cc compile FILE`, the plugin's own options, flags."""
    try:
        words = shlex.split(path.read_text(encoding="utf-8", errors="surrogateescape"))[3:]
    except (OSError, ValueError):
        return None
    target, flags = "", []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name not in OWN_OPTIONS:
            flags.append(f"{name}{equals}{value}")
            continue
        value = value if equals else words.pop(0) if words else ""
        target = value if name == "--target" else target
    return _Command(target, shlex.join(flags)) if target else None


def _versions(given: Mapping[str, str]) -> dict[str, str]:
    versions = {**installed_versions(), **given}
    if unknown := sorted(given.keys() - set(PACKAGES)):
        fix = f"use {', '.join(PACKAGES)}"
        raise InputError(f"unknown package: {unknown[0]!r}", where="--version-of", fix=fix)
    if absent := [name for name in NEEDED if name not in versions]:
        what = f"unknown version, because it is not installed on this host: {', '.join(absent)}"
        options = " ".join(f"--version-of {name}=VERSION" for name in absent)
        raise InputError(what, where="--version-of", fix=f"pack on the host of the server, or add {options}")
    return {name: versions[name] for name in PACKAGES if name in versions}


def _tensor(serve: Sequence[str]) -> int:
    """Return the ranks of the server; vLLM's default is one."""
    match = re.search(r"(?:^| )(?:--tensor-parallel-size|-tp)[ =]([0-9]+)(?: |$)", " ".join(serve))
    return int(match[1]) if match else 1


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        what, fix = f"invalid name of a release: {name!r}", "use lower-case letters, digits, dots, dashes, underscores"
        raise InputError(what, where="--name", fix=fix)
    return name


def _read(manifest: CacheManifest, root: Path) -> tuple[CacheBackend, list[str]]:
    """Return the manifest's facts, and the keys of the entries, which are checked again."""
    facts = manifest.backend
    keys, faults = entries(root / CACHE_FOLDER)
    faults += absent(facts.expects, keys, "the artifact")
    if facts.expects:
        faults += [f"{key}: not a graph that the manifest lists" for key in sorted(set(keys) - set(facts.expects))]
    faults += foreign(manifest)
    faults += [f"invalid name of a variable: {name!r}" for name in facts.environment if not VARIABLE.fullmatch(name)]
    if faults:
        raise ArtifactError(shown(faults), where=str(root), fix="do not use this artifact; pack the cache again")
    return facts, keys


def foreign(manifest: CacheManifest) -> list[str]:
    """Return what says which files of a manifest do not belong into a compile cache."""
    return [f"{name}: not a file of a compile cache" for name in manifest.files if not _is_of_cache(name)]


def _is_of_cache(name: str) -> bool:
    parts = PurePosixPath(name).parts
    inside = len(parts) > 3 and parts[:2] == CACHE_FOLDER.parts and (parts[2] == NKI or bool(KEY.fullmatch(parts[2])))
    return inside and not any(map(OF_ONE_SERVER.fullmatch, parts[3:]))


def check_same_host(manifest: CacheManifest, host: Mapping[str, str], versions: Mapping[str, str]) -> None:
    """Reject a cache for another chip, or that other package versions filled.

    `host` is the result of `host_facts`; without a Neuron device the chip is not checked, and neither are packages that
    `versions` lacks.

    Raises:
        ArtifactError: every difference.

    """
    if host.get("device") == "neuron":
        check_host(manifest, host)
    faults = [
        f"{name}: filled with {built}, this host has {versions[name]}"
        for name, built in manifest.toolchain.items()
        if name in versions and versions[name] != built
    ]
    if faults:
        where, fix = (
            f"{manifest.name}@{manifest.version}",
            "install these versions, or fill a cache with this host's versions",
        )
        raise ArtifactError("; ".join(faults), where=where, fix=fix)


def _new(manifest: CacheManifest, folder: Path) -> set[str]:
    """Return the keys (and `nki`) of entries that are not installed yet.

    Raises:
        ArtifactError: an installed entry has another content.

    """
    new, faults = set(), []
    for top in {name.split("/")[2] for name in manifest.files}:
        if not os.path.lexists(folder / top):
            new.add(top)
            continue
        for name in _of(manifest, top):
            path = folder.parent.parent / name
            if not path.is_file() or path.is_symlink():
                if top == NKI and not os.path.lexists(path):
                    new.add(NKI)  # each kernel is an entry
                    continue
                faults.append(f"{name}: missing, or not a file")
            elif fault := difference(path, manifest.files[name]):
                faults.append(f"{name}: {fault}")
    if faults:
        raise _occupied(sorted(faults), folder)
    return new


def _occupied(faults: Sequence[str], folder: Path) -> ArtifactError:
    what = f"installed entries have another content; not overwritten: {shown(faults)}"
    return ArtifactError(what, where=str(folder), fix="use an empty --cache-root, or remove these entries")


def _of(manifest: CacheManifest, top: str) -> list[str]:
    return [name for name in manifest.files if name.startswith(f"{CACHE_FOLDER}/{top}/")]


def _copy(source: Path, target: Path) -> None:
    """Copy a file; a link would let the plugin write into the artifact."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def shown(faults: Sequence[str], separator: str = "; ") -> str:
    """Return the first of many texts, and how many more there are."""
    no_string(faults, "faults", "texts")
    more = f"{separator}and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return separator.join(faults[:SHOWN]) + more


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
