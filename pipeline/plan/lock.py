"""The lock beside a recipe pins what can change and can be restored: sources by digest, versions, compiler flags.

Facts of one machine are recorded, so that a build can report what differs, and pinned only by the recipe. The configs
let a recipe be checked and planned without its weights. A lock is JSON with sorted keys, so that it diffs well. This
module compares and stores locks; the caller fetches sources and names toolchains.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import InputError, Problem
from pipeline.files.atomic import FileDigest, write_atomic
from pipeline.files.limits import parse_json
from pipeline.models import mtp
from pipeline.models.config import ModelConfig
from pipeline.models.eagle3 import fitted, with_rope_of
from pipeline.models.eagle3_writers import RECIPE
from pipeline.models.families import config_of
from pipeline.models.layer_types import of_layers
from pipeline.recipe.document import read as read_document
from pipeline.recipe.schema import Recipe
from pipeline.sources.checkpoint import Checkpoint, weight_files
from pipeline.sources.hub import is_commit

VERSION = 1
MACHINE_FACTS = ("cxx", "isa")
"""Entries of a toolchain that differ between machines of one class. A recipe pins them by keys of `backend`."""
MISSING = "missing"
"""Version of a package that is not installed."""
PACKAGES = {"torch", "torch-neuronx", "neuronx-distributed", "libneuronxla", "neuronx-cc"}
"""Entries of a toolchain that are versions of packages."""
OWN_CODE = ("kernel",)
"""Flags that are digests of Tandem's own source, which its version pins."""


@dataclass(frozen=True)
class LockedSource:
    """One model at the time of locking.

    `files` holds the digests of its files, or only that of its config if the weights were never fetched: then the
    revision pins the weights. `config` is its `config.json`.
    """

    source: str
    revision: str
    files: dict[str, FileDigest] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def floating(self) -> bool:
        """Whether the revision is a branch or tag, which may move."""
        return self.source.startswith("hf://") and not is_commit(self.revision)

    @property
    def has_weights(self) -> bool:
        """Whether the digests of the weights are known."""
        return any(name.endswith(".safetensors") for name in self.files)


@dataclass(frozen=True)
class Lock:
    """The pins of one recipe. A derived draft has no source of its own; an empty section is not pinned.

    `toolchain` has versions, `flags` the settings of the compiler. `made_with` has the facts of the machine that made
    the lock, which are not pinned.
    """

    recipe_sha256: str
    target: LockedSource
    draft: LockedSource | None = None
    toolchain: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)


def lock_path(recipe: Path) -> Path:
    """Return the path of the lock of a recipe file."""
    return recipe.with_suffix(".lock")


def make_lock(
    recipe: Recipe, target: Checkpoint, draft: Checkpoint, toolchain: Mapping[str, str], flags: Mapping[str, str]
) -> Lock:
    """Pin a recipe to the current checkpoints of its sources, and to a toolchain and its flags."""
    own_draft = recipe.draft.source is not None
    lock = Lock(
        recipe.digest(),
        _locked(recipe.target.source, target),
        _locked(str(recipe.draft.source), draft) if own_draft else None,
    )
    return with_toolchain(lock, toolchain, flags)


def with_toolchain(lock: Lock, toolchain: Mapping[str, str], flags: Mapping[str, str]) -> Lock:
    """Return a lock of the same sources that pins this toolchain, without the build tags of its versions.

    A toolchain that lacks a package, as on a machine without the Neuron SDK, compiles nothing: its versions are not
    those of a build, so none of them is pinned.
    """
    # torch 2.13.0+cpu and 2.13.0+cu130 compile the same artifact for a CPU.
    public = {name: version.partition("+")[0] for name, version in toolchain.items()}
    versions = {name: version for name, version in public.items() if name not in MACHINE_FACTS}
    pinned = {"backend": public["backend"]} if MISSING in versions.values() else versions
    return replace(
        lock,
        toolchain={"tandem": __version__} | pinned,
        flags={name: value for name, value in flags.items() if name not in OWN_CODE},
        made_with={name: version for name, version in public.items() if name in MACHINE_FACTS},
    )


def with_weights(lock: Lock, target: Checkpoint, draft: Checkpoint, found: Mapping[str, str]) -> Lock:
    """Return a lock with the digests of weights that were read where they are stored; `found`: sha256 by address."""

    def known(source: LockedSource, checkpoint: Checkpoint) -> LockedSource:
        files = {n: FileDigest(found[str(f)], f.size) for n, f in checkpoint.remote.items() if str(f) in found}
        return replace(source, files=source.files | files)

    return replace(lock, target=known(lock.target, target), draft=lock.draft and known(lock.draft, draft))


def _locked(source: str, checkpoint: Checkpoint) -> LockedSource:
    return LockedSource(source, checkpoint.revision, dict(checkpoint.files), dict(checkpoint.config_json))


def relock(recipe: Recipe, lock: Lock) -> Lock:
    """Return the same pins for a recipe whose other keys changed; reads no source.

    Raises:
        InputError: the recipe names another source than the lock.

    """
    pairs = [("target.source", recipe.target.source, lock.target.source)]
    pairs.append(("draft.source", recipe.draft.source or "", lock.draft.source if lock.draft else ""))
    for key, source, locked in pairs:
        if source != locked:
            what = f"the recipe has {source or 'a derived draft'}, the lock has {locked or 'a derived draft'}"
            raise InputError(
                what,
                where=recipe.place(key),
                fix=f"on a host that can read the source, run: tandem recipe lock {recipe.argument()}",
            )
    return replace(lock, recipe_sha256=recipe.digest())


def digest(lock: Lock) -> str:
    """Return the sha256 of a lock's contents."""
    return hashlib.sha256(to_bytes(lock)).hexdigest()


def write(path: Path, lock: Lock) -> None:
    """Write a lock atomically."""
    write_atomic(path, to_bytes(lock))


def to_bytes(lock: Lock) -> bytes:
    """Return the text of a lock file."""
    return (json.dumps({"version": VERSION, **asdict(lock)}, indent=2, sort_keys=True) + "\n").encode()


def read(path: Path) -> Lock:
    """Read a lock (JSON, or YAML, of which JSON is a part).

    Raises:
        InputError: no such file, or a damaged lock; names the key.

    """
    if not path.is_file():
        raise InputError("no lock file", where=str(path), fix=_relock_command(path))
    data = _data(path)
    if data.get("version") != VERSION:
        what = f"found version {data.get('version')!r}, accepted: {VERSION}"
        raise InputError(what, where=f"{path}: version", fix=_relock_command(path))
    unknown = sorted(data.keys() - {"version", *(f.name for f in fields(Lock))})
    if unknown:
        raise InputError("unknown key", where=f"{path}: {unknown[0]}", fix=_relock_command(path))
    return _lock_of(data, path)


def _data(path: Path) -> dict[str, Any]:
    """Return a lock's plain data, read as JSON, which is fast, or else as YAML, whose errors have lines."""
    try:
        data = parse_json(path.read_bytes(), _mapping)
        if isinstance(data, dict):
            return data
    except ValueError:
        pass  # YAML, damaged, or with a repeated key: the document reader reports which, with the line
    document = read_document(path)
    if document.problems:
        first = document.problems[0]
        raise InputError(first.what, where=first.where, fix=_relock_command(path))
    return document.data


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("key given twice")
    return dict(pairs)


def _lock_of(data: dict[str, Any], path: Path) -> Lock:
    from pydantic import TypeAdapter, ValidationError

    try:
        plain = {key: value for key, value in data.items() if key != "version"}
        return TypeAdapter(Lock).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"damaged lock: {first['msg']}", where=f"{path}: {key}", fix=_relock_command(path)) from error


def _relock_command(path: Path) -> str:
    return f"run: {lock_command(path)}"


def lock_command(path: Path) -> str:
    """Return the command that writes the lock of a recipe; `path` is the recipe's file or its lock."""
    named = path.parent in (Path("recipes"), Path())
    return f"tandem recipe lock {path.stem if named else shlex.quote(str(path.with_suffix('.yaml')))}"


def pair_configs(recipe: Recipe, lock: Lock, where: str) -> tuple[ModelConfig, ModelConfig]:
    """Return the configs of target and draft from the lock alone; `where` names the lock in errors.

    Raises:
        SourceError: a config that is not supported.
        InputError: the sources of the lock and of the recipe differ.

    """
    relock(recipe, lock)
    target = config_of(lock.target.config, f"{where}: target.config")
    if lock.draft is not None:
        told = {RECIPE: recipe.draft.readings}
        config = with_rope_of(lock.target.config, lock.draft.config | told)
        draft = config_of(config, f"{where}: draft.config")
        return target, fitted(target, draft, f"{where}: draft.config")
    return target, config_of(derived_config(recipe, lock.target.config), f"{where}: draft.config")


def derived_config(recipe: Recipe, target: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config.json` of a draft that consists of layers of the target, or is its MTP module.

    Raises:
        InputError: a layer that the target does not have.
        SourceError: a target whose modules are not read.

    """
    layers = recipe.draft.derive.layers if recipe.draft.derive else ()
    if layers is None:
        return mtp.of_target(target, recipe.place("draft.derive.mtp"))
    whole = config_of(target, "target.config")
    for layer in layers:
        if layer >= whole.layers:
            fix = f"use layers of 0..{whole.layers - 1}"
            raise InputError(f"the target has no layer {layer}", where=recipe.place("draft.derive.layers"), fix=fix)
    return {**target, **of_layers(whole, target, layers), "shares_embedding": True}


def check_locked(lock: Lock, fresh: Lock, where: str = "lock") -> list[Problem]:
    """Return what `--locked` rejects: each item that differs from the lock, with both values, and moving revisions."""
    command = lock_command(Path(where))
    fix = f"restore the locked value, or accept the change: {command}"
    drift = [
        Problem(f"{where}: {key}", f"locked {locked}, found {actual}", fix)
        for key, locked, actual in _drift(lock, fresh)
    ]
    if lock.recipe_sha256 != fresh.recipe_sha256:
        drift.insert(
            0,
            Problem(f"{where}: recipe_sha256", "the recipe was edited after the lock", f"{command}, or undo the edit"),
        )
    for role, source in (("target", lock.target), ("draft", lock.draft)):
        if source is not None and source.floating:
            what = f"locked to the branch or tag {source.revision!r}, which can move"
            again = f"on a host that can reach the Hub, run: {command}"
            drift.append(Problem(f"{where}: {role}.revision", what, again))
    return drift


def stale(recipe: Recipe, lock: Lock, where: str = "lock") -> list[Problem]:
    """Return what `--locked` would reject, as far as the recipe and the installed packages show it; reads no source."""
    draft = recipe.draft.source and replace(lock.draft or LockedSource("", ""), source=recipe.draft.source)
    fresh = replace(
        lock,
        recipe_sha256=recipe.digest(),
        target=replace(lock.target, source=recipe.target.source),
        draft=draft or None,
        toolchain=lock.toolchain | _installed(lock.toolchain),
    )
    return check_locked(lock, fresh, where)


def other_files(lock: Lock, sources: Iterable[Checkpoint], where: str = "lock") -> list[Problem]:
    """Return what `--locked` would reject of files in sources' folders: by digest, of weights without one by size."""
    fix = f"restore the locked file, or accept the change: {lock_command(Path(where))}"
    found: list[Problem] = []
    for role, locked, checkpoint in zip(("target", "draft"), (lock.target, lock.draft), sources, strict=True):
        files = dict(locked.files) if locked else {}
        for name in files.keys() & checkpoint.files.keys():
            if files[name] != checkpoint.files[name]:
                what = f"locked {_digest_text(files[name])}, found {_digest_text(checkpoint.files[name])}"
                found.append(Problem(f"{where}: {role}.files.{name}", what, fix))
        for name, size in _weight_sizes(checkpoint).items():
            if name in files and name not in checkpoint.files and files[name].size != size:
                what = f"locked {files[name].size} bytes, found {size}"
                found.append(Problem(f"{where}: {role}.files.{name}", what, fix))
    return found


def _weight_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the sizes in bytes of the weight files in a checkpoint's folder."""
    paths = [] if checkpoint.remote else [checkpoint.root / name for name in weight_files(checkpoint.root)]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def _installed(toolchain: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the toolchain's packages in this environment, without importing them."""
    versions = {"tandem": __version__} if "tandem" in toolchain else {}
    for name in toolchain.keys() & PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name).partition("+")[0]
    return versions


def unpinned(lock: Lock, fresh: Lock) -> str:
    """Return what differs from the machine that made the lock and is not pinned, for a log line; empty if nothing."""
    earlier = {key: text for key, text in lock.toolchain.items() if key in MACHINE_FACTS}
    recorded = earlier | lock.made_with
    changed = _differences("", recorded, fresh.made_with, recorded.keys())
    return ", ".join(f"{key.removeprefix('.')} {after} (lock: {before})" for key, before, after in changed)


def _drift(lock: Lock, fresh: Lock) -> Iterator[tuple[str, str, str]]:
    """Yield key, locked value and current value of each difference but the recipe's digest, which tells no reader."""
    yield from _source_drift("target", lock.target, fresh.target)
    if lock.draft is not None and fresh.draft is not None:
        yield from _source_drift("draft", lock.draft, fresh.draft)
    elif lock.draft is not fresh.draft:
        yield "draft", _origin(lock.draft), _origin(fresh.draft)
    pinned = _pinned(lock.toolchain)
    yield from _differences("toolchain", pinned, fresh.toolchain, pinned.keys())
    if lock.flags:  # a flag that the lock lacks changes the code as well
        yield from _differences("flags", lock.flags, fresh.flags, lock.flags.keys() | fresh.flags.keys())


def _pinned(toolchain: Mapping[str, str]) -> dict[str, str]:
    """Return what a lock's toolchain pins; older locks also have facts of a machine, and build tags of versions."""
    return {key: text.partition("+")[0] for key, text in toolchain.items() if key not in MACHINE_FACTS}


def _differences(
    section: str, locked: Mapping[str, str], fresh: Mapping[str, str], keys: Collection[str]
) -> Iterator[tuple[str, str, str]]:
    for key in sorted(keys):
        before, after = locked.get(key, "nothing"), fresh.get(key, "nothing")
        if before != after:
            yield f"{section}.{key}", before, after


def _source_drift(role: str, locked: LockedSource, fresh: LockedSource) -> Iterator[tuple[str, str, str]]:
    for key, before, after in (("source", locked.source, fresh.source), ("revision", locked.revision, fresh.revision)):
        if before != after:
            yield f"{role}.{key}", before, after
    names = locked.files.keys() | fresh.files.keys() if locked.has_weights else locked.files.keys()
    for name in sorted(names):
        before, after = (_digest_text(files.get(name)) for files in (locked.files, fresh.files))
        if before != after:
            yield f"{role}.files.{name}", before, after


def _digest_text(file: FileDigest | None) -> str:
    return f"sha256 {file.sha256} ({file.size} bytes)" if file else "no such file"


def _origin(source: LockedSource | None) -> str:
    return source.source if source else "a draft derived from the target"
