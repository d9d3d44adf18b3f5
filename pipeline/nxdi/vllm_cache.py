"""Compile caches of vLLM's newer Neuron plugin, an artifact kind of their own: packed, and installed for vLLM to read.

    neuron/compile_cache/<key>/   a graph: graph.hlo graph_<key>.neff .artifact_metadata_v0.json .compilation_complete
    neuron/compile_cache/nki/     kernels
    manifest.json                 versions, flags, chip, and the arguments and environment of the server that filled it

The layout is that of the plugin's sources (vllm_neuron 0.21: compile/{cache,backend,schema,parallel_compile}.py and
nki/nki_cache.py). A key names a graph, its shapes, versions and flags; what else a server wants is a miss: an error
in the environment printed here. Compiles nothing, runs nothing, opens no NEFF. Imports no torch.
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
from pipeline.errors import ArtifactError, InputError
from pipeline.files.atomic import atomic_dir, check_space, create_only, digest_file
from pipeline.nxdi.vllm_args import VARIABLE, shell_line
from pipeline.nxdi.vllm_cache_layout import KEY, NKI, OF_ONE_SERVER, entries, entry_faults, listing
from pipeline.registry.release import VERSION_LENGTH

PLACE = PurePosixPath("neuron/compile_cache")
"""Where the plugin keeps it under VLLM_CACHE_ROOT."""

ROOT = "VLLM_CACHE_ROOT"
COMMAND = "command.txt"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SHOWN = 6
NEVER_COMPILE = {
    "VLLM_NEURON_DISABLE_WARMUP_COMPILE": "1",
    "VLLM_NEURON_DISABLE_GRAPH_CAPTURE_BACKEND": "1",
    "NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND": "1",
}
"""A miss is an error, and no graphs are captured, since those are compiled without asking the first switch. The other
has two names: one is in the sources of 0.21, one in AWS's documents of 0.24."""

CONTRADICTIONS = ("VLLM_NEURON_DISABLE_COMPILE_CACHE", "NEURON_LIBTORCH_DISABLE_COMPILE_CACHE", ROOT, *NEVER_COMPILE)
PACKAGES = ("vllm", "vllm-neuron", "libtorch-neuronx-lite", "torch-neuronx", "neuronx-cc", "nki")
NEEDED = ("vllm-neuron", "neuronx-cc")
OWN_OPTIONS = ("--framework", "--target", "--output", "--logfile")
"""What the plugin tells the compiler itself; the rest of a command are flags."""


@dataclass(frozen=True)
class Filled:
    """How a cache was filled: arguments of `vllm serve`, variables, and versions where other than those installed."""

    serve: Sequence[str]
    environment: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Installed:
    """What came of an installation, and what a server is started with. `unchecked` versions are not known here."""

    cache_root: str
    environment: Mapping[str, str]
    command: tuple[str, ...]
    added: int
    kept: int
    unchecked: tuple[str, ...]

    def shell(self) -> str:
        """One line for a shell."""
        return shell_line(self.environment, self.command)


def installed_versions() -> dict[str, str]:
    """Packages of this host that decide a key or trace the graph; those that are absent are left out."""
    found = {}
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version != PLACEHOLDERS.get(name):
            found[name] = version
    return found


def pack(source: Path, out: Path, name: str, filled: Filled) -> CacheManifest:
    """Make an artifact of a cache folder, or of the VLLM_CACHE_ROOT that it lies in.

    Raises:
        InputError: no cache, another layout, an entry without its marks, a missing fact, or `out` holds something else.
        HostError: no space, read-only or forbidden.

    """
    cache = source / PLACE if (source / PLACE).is_dir() else source
    if not cache.is_dir():
        raise InputError(
            "no such folder", where=str(cache), fix="name the VLLM_CACHE_ROOT of the server that filled it"
        )
    keys, faults = entries(cache)
    if faults:
        fix = "let the server finish its warm-up, then stop it; remove entries that no server finished"
        raise InputError(_some(faults), where=str(cache), fix=fix)
    check_replaceable(out)
    toolchain = {"backend": CACHE_KIND, **_versions(filled.versions)}
    told = _told(cache, keys, filled)
    names = [name for top in (*keys, NKI) for name in listing(cache, top)]
    check_space(out, sum((cache / one).stat().st_size for one in names))
    with atomic_dir(out) as folder:
        files = {}
        for one in names:
            _copy(cache / one, folder / PLACE / one)
            digest = digest_file(folder / PLACE / one)
            files[str(PLACE / one)] = FileEntry(sha256=digest.sha256, size=digest.size)
        if late := [fault for key in keys for fault in entry_faults(folder / PLACE / key)]:
            raise InputError(f"changed while it was packed: {_some(late)}", where=str(cache), fix="stop the server")
        made = CacheManifest(
            name=_checked_name(name), version="unversioned", created=_now(),
            toolchain=toolchain, backend=told, tensor=_tensor(filled.serve), files=files,
            requires={"device": "neuron", "chip": told.target},
        )  # fmt: skip
        made = made.model_copy(update={"version": content_digest(made)[:VERSION_LENGTH]})
        (folder / MANIFEST).write_bytes(dump(made))
    return made


def install(root: Path, cache_root: Path, *, host: Mapping[str, str], versions: Mapping[str, str]) -> Installed:
    """Put a verified cache where vLLM reads it: whole entries, none of which replaces another.

    `host` is told as `host_facts` tells it; where it has no Neuron device, the chip is not checked, and packages that
    `versions` lacks are not either. A kill leaves whole entries, and the next call brings the others.

    Raises:
        InputError: an artifact of another kind.
        ArtifactError: it does not verify, is incomplete, is for another host, or something else is there already.
        HostError: no space, read-only or forbidden.

    """
    manifest, base, place = verify(root).manifest, cache_root.absolute(), cache_root.absolute() / PLACE
    if not isinstance(manifest, CacheManifest):
        raise InputError("this is no compile cache", where=str(root), fix="tandem inspect says what it is")
    told, keys = _read(manifest, root)
    _check_host(manifest, host, versions)
    new = _new(manifest, place)
    check_space(place, sum(entry.size for name, entry in manifest.files.items() if name.split("/")[2] in new))
    for key in [key for key in keys if key in new]:
        with atomic_dir(place / key, replace=False, aside=base) as folder:
            for name in _of(manifest, key):
                _copy(root / name, folder / Path(name).relative_to(PLACE / key))
    if NKI in new:
        for name in _of(manifest, NKI):
            if not create_only(base / name, (root / name).read_bytes()) and difference(
                base / name, manifest.files[name]
            ):
                raise _occupied([f"{name}: came meanwhile"], place)
    fresh = len(new - {NKI})
    environment = {**told.environment, ROOT: str(base), **NEVER_COMPILE}
    unchecked = tuple(name for name in manifest.toolchain if name != "backend" and name not in versions)
    return Installed(str(base), environment, ("vllm", "serve", *told.serve), fresh, len(keys) - fresh, unchecked)


def _told(cache: Path, keys: Sequence[str], filled: Filled) -> CacheBackend:
    """What the manifest tells: chip and flags are read from the commands that the plugin left in its entries."""
    commands = [found for key in keys if (found := _command(cache / key / COMMAND))]
    targets, flags = ({found[i] for found in commands} for i in (0, 1))
    if len(targets) != 1:
        what = f"the entries are for {', '.join(sorted(targets)) or 'an unknown chip'}"
        fix = f"pack a cache of one chip, as the plugin left it: {COMMAND} in its entries tells the chip"
        raise InputError(what, where=str(cache), fix=fix)
    for name in filled.environment:
        if not VARIABLE.fullmatch(name) or name in CONTRADICTIONS:
            what = f"{name!r} is no variable that a server on this cache can have"
            raise InputError(what, where="--env", fix="leave it out: install sets what decides about the cache")
    return CacheBackend(
        target=targets.pop(), flags=tuple(sorted(flags)), serve=tuple(filled.serve),
        environment=dict(filled.environment), keys=len(keys),
    )  # fmt: skip


def _command(path: Path) -> tuple[str, str] | None:
    """Target and flags of a compiler's command: `neuronx-cc compile FILE`, the plugin's own options, flags."""
    try:
        words = shlex.split(path.read_text())[3:]
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
    return (target, shlex.join(flags)) if target else None


def _versions(given: Mapping[str, str]) -> dict[str, str]:
    found = {**installed_versions(), **given}
    if unknown := sorted(given.keys() - set(PACKAGES)):
        raise InputError(f"{unknown[0]!r} is none of {', '.join(PACKAGES)}", where="--version-of", fix="leave it out")
    if absent := [name for name in NEEDED if name not in found]:
        what = f"not installed here, so that their versions are not known: {', '.join(absent)}"
        fix = "pack where the server ran, or name them: " + " ".join(f"--version-of {one}=VERSION" for one in absent)
        raise InputError(what, where="--version-of", fix=fix)
    return {name: found[name] for name in PACKAGES if name in found}


def _tensor(serve: Sequence[str]) -> int:
    """Ranks of the server; vLLM's default is one."""
    match = re.search(r"(?:^| )(?:--tensor-parallel-size|-tp)[ =]([0-9]+)(?: |$)", " ".join(serve))
    return int(match[1]) if match else 1


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        what, fix = f"{name!r} cannot name a release", "use lower-case letters, digits, dots, dashes, underscores"
        raise InputError(what, where="--name", fix=fix)
    return name


def _read(manifest: CacheManifest, root: Path) -> tuple[CacheBackend, list[str]]:
    """What the manifest tells, and the entries, which are looked at again: a manifest's word is not enough."""
    told = manifest.backend
    keys, faults = entries(root / PLACE)
    faults += [f"{name}: no part of a cache" for name in manifest.files if not _part(name)]
    faults += [f"{name!r}: no variable" for name in told.environment if not VARIABLE.fullmatch(name)]
    if faults:
        raise ArtifactError(_some(faults), where=str(root), fix="do not use this artifact; pack the cache again")
    return told, keys


def _part(name: str) -> bool:
    parts = PurePosixPath(name).parts
    inside = len(parts) > 3 and parts[:2] == PLACE.parts and (parts[2] == NKI or bool(KEY.fullmatch(parts[2])))
    return inside and not any(map(OF_ONE_SERVER.fullmatch, parts[3:]))


def _check_host(manifest: CacheManifest, host: Mapping[str, str], versions: Mapping[str, str]) -> None:
    if host.get("device") == "neuron":
        check_host(manifest, host)
    faults = [
        f"{name}: filled with {built}, this host has {versions[name]}"
        for name, built in manifest.toolchain.items()
        if name in versions and versions[name] != built
    ]
    if faults:
        where, fix = f"{manifest.name}@{manifest.version}", "install these versions, or fill a cache with those here"
        raise ArtifactError("; ".join(faults), where=where, fix=fix)


def _new(manifest: CacheManifest, place: Path) -> set[str]:
    """Entries (and kernels) that are not there yet.

    Raises:
        ArtifactError: what is there under their names is not the same.

    """
    new, faults = set(), []
    for top in {name.split("/")[2] for name in manifest.files}:
        if not os.path.lexists(place / top):
            new.add(top)
            continue
        for name in _of(manifest, top):
            path = place.parent.parent / name
            if not path.is_file() or path.is_symlink():
                if top == NKI and not os.path.lexists(path):
                    new.add(NKI)  # kernels are files of their own
                    continue
                faults.append(f"{name}: not there, or not a file")
            elif fault := difference(path, manifest.files[name]):
                faults.append(f"{name}: {fault}")
    if faults:
        raise _occupied(sorted(faults), place)
    return new


def _occupied(faults: Sequence[str], place: Path) -> ArtifactError:
    what = f"another content is here already, and is not replaced: {_some(faults)}"
    return ArtifactError(what, where=str(place), fix="name an empty --cache-root, or remove these entries")


def _of(manifest: CacheManifest, top: str) -> list[str]:
    return [name for name in manifest.files if name.startswith(f"{PLACE}/{top}/")]


def _copy(source: Path, target: Path) -> None:
    """A copy, never a link: the plugin writes into its cache."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _some(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
