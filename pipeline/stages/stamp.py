"""The stamp of an output: all inputs of its last build, to detect changes without importing torch. Runs no stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.artifact.manifest import MANIFEST, read
from pipeline.artifact.verify import check_replaceable
from pipeline.errors import ArtifactError
from pipeline.files.atomic import check_writable, disk_errors, sha256_file, write_atomic
from pipeline.files.home import expanded
from pipeline.files.limits import parse_json
from pipeline.files.unfinished import sweep_once
from pipeline.progress import Log
from pipeline.sources.kinds import current_revision, moving
from pipeline.stages.settings import BuildSettings
from pipeline.validate.prompts import prompts_path

VERSIONED = ("torch", "transformers", "safetensors", "gguf", "tokenizers")


class Stamp:
    """The record of the last complete build of one output: its inputs and its artifact."""

    def __init__(self, cache: Path, out: Path) -> None:
        name = hashlib.sha256(bytes(out.absolute())).hexdigest()[:16]
        self.path, self.out = cache / "stamps" / f"{name}.json", out

    @property
    def lock_file(self) -> Path:
        """Held while a build of this output runs."""
        return self.path.with_suffix(".lock")

    def is_current(self, inputs: dict[str, Any]) -> bool:
        """Return whether the output holds the artifact of these inputs; compares the manifest's digest and file sizes.

        An unknown revision counts as unchanged: without a network no newer one can be built.
        """
        sweep_once(self.out.parent)  # a build that ended after it had replaced the output left the earlier one
        try:
            recorded = parse_json(self.path.read_bytes())
            files = read(self.out).manifest.files
            unknown = {source for source, revision in inputs["revisions"].items() if revision is None}
            revisions = inputs["revisions"] | {source: recorded["inputs"]["revisions"][source] for source in unknown}
            return (
                recorded["inputs"] == json.loads(json.dumps(inputs | {"revisions": revisions}))
                and recorded["artifact"] == self._identity()
                and all((self.out / name).stat().st_size == entry.size for name, entry in files.items())
            )
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return False

    def clear(self) -> None:
        """Remove the record of the last build; nothing is current until the next build ends."""
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)

    def record(self, inputs: dict[str, Any]) -> None:
        """Record the inputs of the artifact in the output directory."""
        write_atomic(self.path, json.dumps({"inputs": inputs, "artifact": self._identity()}).encode())

    def _identity(self) -> str:
        """Return a digest of the artifact with its reports."""
        return sha256_file(self.out / MANIFEST)


@contextlib.contextmanager
def build_lock(lock: Path, log: Log, holder: str) -> Iterator[None]:
    """Hold a lock file among all builds that share this cache; the lock of a killed build is released.

    `holder` names the process to wait for in the log.
    """
    file_lock = FileLock(lock)
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            log(f"waiting for {holder}")
            file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def is_building(cache: Path, out: Path) -> bool:
    """Return whether a build of this output runs now."""
    lock = Stamp(cache, out).lock_file
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


@dataclass(frozen=True)
class LockedBuild:
    """A build that holds its output's lock, and its inputs before any of them was read.

    Inputs that change later make the stamp stale.
    """

    settings: BuildSettings
    stamp: Stamp
    inputs: dict[str, Any]

    def is_current(self) -> bool:
        """Return whether the output holds the artifact of these inputs."""
        return self.stamp.is_current(self.inputs)

    def begin(self) -> None:
        """Check that the output can be written, and clear its stamp.

        Raises:
            ArtifactError: the output exists and is not an artifact.
            HostError: it cannot be written.

        """
        check_replaceable(self.settings.out)
        check_writable(self.settings.out.absolute().parent)
        self.stamp.clear()

    def record(self) -> None:
        """Record that the output is that of the inputs."""
        self.stamp.record(self.inputs)


@contextlib.contextmanager
def locked_builds(builds: Sequence[BuildSettings]) -> Iterator[list[LockedBuild]]:
    """Lock the outputs of builds, in one order everywhere, and take their inputs."""
    with contextlib.ExitStack() as locks:
        for settings in sorted(builds, key=lambda settings: settings.out.absolute()):
            lock = Stamp(settings.cache, settings.out).lock_file
            locks.enter_context(build_lock(lock, settings.log, f"another build of {settings.out}"))
        yield [LockedBuild(settings, Stamp(settings.cache, settings.out), fingerprint(settings)) for settings in builds]


def fingerprint(settings: BuildSettings) -> dict[str, Any]:
    """Return the inputs of a build that can be read without torch.

    Recipe, package, versions, local files, and the current revisions of sources that may move.
    """
    package = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        package.update(path.read_bytes())
    cxx = (os.environ.get("CXX") or "").strip() or "g++"
    return {
        "recipe": settings.recipe.model_dump_json(by_alias=True),
        "package": package.hexdigest(),
        "versions": {name: _version(name) for name in VERSIONED},
        "compiler": [cxx, *(shutil.which(part) for part in (cxx, *cxx.split()))],  # ccache and the compiler
        "revisions": _revisions(settings),
        "files": sorted(_stamp_of(path) for path in _local_files(settings) if path.is_file()),
        "validate": settings.validate,
        "locked": settings.locked,
    }


def _revisions(settings: BuildSettings) -> dict[str, str | None]:
    """Return the current revision of each source that may move; None if unknown, for example without a network."""
    sources = (settings.recipe.target.source, settings.recipe.draft.source)
    revisions = {source: current_revision(source) for source in sources if source and moving(source)}
    for source in [source for source, revision in revisions.items() if revision is None]:
        settings.log(f"{source}: current revision unknown; assumed unchanged since the last build")
    return revisions


def _local_files(settings: BuildSettings) -> list[Path]:
    """Return the input files outside the package: weights, prompts, and the lock of a locked build."""
    recipe, base = settings.recipe, settings.base
    names = [n for n in (recipe.target.source, recipe.draft.source) if n and "://" not in n]
    files = [path for name in names for path in _files(base / expanded(name))]
    files.append(prompts_path(recipe.validate_.prompts, base))
    return [*files, settings.lock_file] if settings.locked else files


def _files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def _stamp_of(path: Path) -> list[Any]:
    """Return facts of a file that change whenever it is written or replaced, even with equal size and time."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
